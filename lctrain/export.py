"""From a checkpoint to a plain Hugging Face folder."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel

from lctrain.checkpoint import check_names, read_values
from lctrain.errors import InputError
from lctrain.folder import RunFolder, is_whole, whole_checkpoints
from lctrain.memory.savings import NOTHING

RECIPE = "lctrain.yaml"  # the resolved config of the run, in every exported folder
PLAIN = {"kernel": "auto", "layer_kernel": "plain", "precision": None, "memory": NOTHING}  # nothing runs here


def main(cfg: DictConfig) -> None:
    """`lctrain export`."""
    print(f"exported to {export(cfg.run_dir, cfg.checkpoint, cfg.output, cfg.dtype)}")


def export(run_dir: str, checkpoint: str, output: str, dtype: str = "auto") -> Path:
    """Merge the adapters of a checkpoint (a path, or auto for the newest whole one) into `output`; returns it.

    The folder holds safetensors, the config with the stretched positions, the tokenizer, and a README with the recipe.
    Weights get the model's dtype, unless `dtype` names another. It is written beside its final name and
    renamed. Raises InputError where there is nothing to export.
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
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    merged.to(recipe.torch_dtype(recipe.config()) if dtype == "auto" else getattr(torch, dtype))
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    merged.save_pretrained(aside)
    recipe.tokenizer.save_pretrained(aside)
    (aside / RECIPE).write_text(OmegaConf.to_yaml(cfg))
    (aside / "README.md").write_text(_readme(cfg, path))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _checkpoint(folder: RunFolder, checkpoint: str) -> Path:
    if checkpoint != "auto":
        if not is_whole(Path(checkpoint)):
            raise InputError(f"checkpoint={checkpoint} is missing or not whole")
        return Path(checkpoint)
    found = whole_checkpoints(folder.checkpoints)
    if not found:
        raise InputError(f"{folder.checkpoints} holds no whole checkpoint")
    return found[-1]


def _readme(cfg: DictConfig, checkpoint: Path) -> str:
    return (
        f"# {cfg.model.get('path', 'a model')} at {cfg.sequence_length:,} tokens\n\n"
        f"Adapted with lctrain, checkpoint {checkpoint.name}. Loads in plain transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n```\n\n"
        f"Trained with `{cfg.attention._target_}`; this folder runs the architecture's own attention.\n\n"
        f"The whole recipe is in {RECIPE}.\n"
    )
