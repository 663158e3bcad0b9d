"""Export a checkpoint as a plain Hugging Face folder."""

import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel

from lctrain import __version__
from lctrain.attention.duo import GATES
from lctrain.attention.head_pattern import HeadPatternAttention
from lctrain.checkpoint import check_names, read_values
from lctrain.errors import InputError
from lctrain.folder import RunFolder, is_whole, whole_checkpoints
from lctrain.heads import JSON, TSV, HeadPattern, architecture
from lctrain.memory.savings import NOTHING
from lctrain.model import learned
from lctrain.model.recipe import ModelRecipe, PretrainedModel

RECIPE = "lctrain.yaml"  # the resolved config of the run, in every exported folder
PLAIN = {"kernel": "auto", "layer_kernel": "plain", "precision": None, "memory": NOTHING}  # no forward runs here


def main(cfg: DictConfig) -> None:
    """Run `lctrain export`."""
    heads = {name: value for name, value in cfg.heads.items() if value is not None}
    print(f"exported to {export(cfg.run_dir, cfg.checkpoint, cfg.output, cfg.dtype, **heads)}")


def export(run_dir: str, checkpoint: str, output: str, dtype: str = "auto", **heads: float) -> Path:
    """Merge a checkpoint (a path, or auto for the newest whole one) into the model, write it to `output`, and return
    that path.

    The folder holds safetensors, the config with the stretched positions, the tokenizer, the recipe and a README.
    Weights get the model's dtype, unless `dtype` names another. What the attention method learned is in
    method.safetensors, not among the model's weights. Gates also become a head pattern in the folder, deployed as
    `heads` says (the fields of HeadPattern.deployed). The folder is written under a
    temporary name and then renamed. Raises InputError if there is nothing to export.
    """
    folder, target = RunFolder(run_dir), Path(output)
    if not folder.config.is_file():
        raise InputError(f"run_dir={run_dir} holds no config.yaml; give the folder of a training run")
    if target.exists() and not (target / RECIPE).is_file():
        raise InputError(f"output={output} exists and is not an earlier export; move it away or choose another")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype} is not a torch dtype; use auto, float32 or bfloat16")
    path = _checkpoint(folder, checkpoint)
    cfg = cast(DictConfig, OmegaConf.load(folder.config))
    recipe = replace(instantiate(cfg.model, _convert_="all"), **PLAIN)
    model = recipe.build()
    found = {name.removeprefix("model."): value for name, value in read_values(path).items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_names(path, found, trained)
    for name, parameter in trained.items():
        parameter.data.copy_(found[name])
    pattern = _head_pattern(model, recipe, {"run": run_dir, "checkpoint": path.name}, heads)
    merged = cast(PreTrainedModel, model.merge_and_unload() if isinstance(model, PeftModel) else model)
    values = learned.take(merged, recipe.attention)
    merged.to(recipe.torch_dtype(recipe.config()) if dtype == "auto" else getattr(torch, dtype))
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    if pattern is not None:  # under the names that DuoAttention's own code reads
        merged.config.update({"sink_size": pattern.num_sink_tokens, "recent_size": pattern.recent_size})
    merged.save_pretrained(aside)
    recipe.tokenizer.save_pretrained(aside)
    (aside / RECIPE).write_text(OmegaConf.to_yaml(cfg))
    if values:
        learned.write(aside, values, cfg.attention)
    for weights in aside.glob("*.safetensors"):  # which safetensors makes readable by their owner only
        weights.chmod((aside / RECIPE).stat().st_mode)
    (aside / "README.md").write_text(_readme(cfg, path, pattern, learns=bool(values)))
    if pattern is not None:
        pattern.write_tsv(aside / TSV)
        pattern.write_json(aside / JSON)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _head_pattern(
    model: PreTrainedModel | PeftModel, recipe: ModelRecipe, origin: dict[str, str], heads: dict[str, float]
) -> HeadPattern | None:
    """Return the head pattern of the trained gates, or the pattern that the run trained with; None without either."""
    if isinstance(recipe.attention, HeadPatternAttention):
        return recipe.attention.pattern.deployed(**heads)  # type: ignore[arg-type]
    gates = [p.detach() for name, p in model.named_parameters() if name.endswith(GATES) and p.requires_grad]
    if not gates:
        if heads:
            raise InputError(f"heads.{next(iter(heads))} is for runs that train gates (attention=duo tuning=gates)")
        return None
    config = recipe.config()
    packages = {"lctrain": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    known = {"architecture": architecture(config), "attention": str(recipe.attention), **origin, **packages}
    known |= {"model": str(recipe.path)} if isinstance(recipe, PretrainedModel) else {}
    found = HeadPattern.from_gates(torch.stack(gates).clamp(0, 1), threshold=0.5, provenance=known)
    return found.deployed(**heads)  # type: ignore[arg-type]


def _checkpoint(folder: RunFolder, checkpoint: str) -> Path:
    if checkpoint != "auto":
        if not is_whole(Path(checkpoint)):
            raise InputError(f"checkpoint={checkpoint} is missing or not whole")
        return Path(checkpoint)
    found = whole_checkpoints(folder.checkpoints)
    if not found:
        raise InputError(f"{folder.checkpoints} holds no whole checkpoint")
    return found[-1]


def _readme(cfg: DictConfig, checkpoint: Path, pattern: HeadPattern | None, *, learns: bool) -> str:
    streams = (
        f"{(~pattern.retrieval_heads).sum()} of {pattern.retrieval_heads.numel()} key-value heads need no more than "
        f"{pattern.num_sink_tokens} sinks and {pattern.recent_size} recent tokens: {JSON} says which. "
        "`lctrain.model.serve.load(folder)` generates with them; plain transformers attends in full.\n\n"
        if pattern is not None
        else ""
    )
    method = (
        f"What the attention learned is in {learned.WEIGHTS}: `lctrain.model.serve.load(folder)` runs it.\n\n"
        if learns and pattern is None
        else ""
    )
    return (
        f"# {Path(cfg.model.get('path', 'a model')).name} at {cfg.model.sequence_length:,} tokens\n\n"
        f"Adapted with lctrain, checkpoint {checkpoint.name}. Loads in plain transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n```\n\n'
        f"Trained with `{cfg.attention._target_}`; this folder runs the architecture's own attention.\n\n"
        f"{streams}{method}"
        f"The whole recipe is in {RECIPE}.\n"
    )
