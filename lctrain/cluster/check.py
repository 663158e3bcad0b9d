"""Checks before a job is queued, of everything that would otherwise fail after hours in the queue."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lctrain.cluster.job import Job, parse_time
from lctrain.cluster.slurm import nodes, partition_limits
from lctrain.errors import InputError
from lctrain.evaluation.run import check as check_tasks
from lctrain.plan.run import plan, verdict

GIB = 2**30


def check_evaluation(cfg: DictConfig, job: Job) -> Iterator[str]:
    """Check an evaluation and yield a line per passed check. Raise InputError at the first failed one."""
    yield f"cluster {check_partition(job)}"
    recipe = instantiate(cfg.model, _convert_="all")
    recipe.check([cfg.sequence_length], "cpu" if job.gpus_per_node == 0 else "cuda")
    yield f"model   {check_model(cfg, job)}"
    datamodule = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")
    check_tasks(cfg, recipe.config(), datamodule)
    yield f"data    {len(datamodule.unseen_documents):,} held-out documents, tokens in {cfg.datamodule.cache_dir}"


def check_training(cfg: DictConfig, job: Job) -> Iterator[str]:
    """Check a training and yield a line per passed check: cheap checks first, tokenizing the data last.

    Raise InputError at the first failed one.
    """
    yield f"cluster {check_partition(job)}"
    yield f"batch   {check_batch(cfg, job)}"
    recipe = instantiate(cfg.model, _convert_="all")
    curriculum = instantiate(cfg.curriculum, _convert_="all")
    device = "cpu" if cfg.trainer.accelerator == "cpu" else "cuda"
    recipe.check(curriculum.lengths(), device, cfg.sequence_parallel_size)
    yield f"model   {check_model(cfg, job)}"
    planned = plan(cfg)
    if planned.memory.peak > cfg.device_memory * GIB:
        raise InputError(f"memory {verdict(planned, cfg)}")
    yield f"memory  {verdict(planned, cfg)}"
    # A checkpoint holds fp32 weights and two moments of what trains, 12 bytes a parameter; while one is written, there
    # is one more than `num_kept`. The export is a copy of every parameter in at most 4 bytes.
    kept = cfg.callbacks.checkpoint.num_kept + 1
    yield f"disk    {check_disk(Path(cfg.run_dir), 12 * planned.trainable * kept + 4 * planned.parameters)}"
    yield f"data    {check_data(cfg, recipe)}"


def check_partition(job: Job) -> str:
    """Compare the job with its partition; `sbatch --test-only` later checks what only the cluster knows."""
    limits = partition_limits(job.partition)
    name = limits["PartitionName"]
    if limits["State"] != "UP":
        raise InputError(f"slurm.partition={name} is {limits['State']}")
    if limits["MaxTime"] != "UNLIMITED" and job.seconds > parse_time(limits["MaxTime"]):
        raise InputError(f"slurm.time={job.time} is more than partition {name} allows: {limits['MaxTime']}")
    if limits["MaxNodes"] != "UNLIMITED" and job.nodes > int(limits["MaxNodes"]):
        raise InputError(f"slurm.nodes={job.nodes} is more than partition {name} allows: {limits['MaxNodes']}")
    there = nodes(name)
    needs = {"cpus": job.tasks_per_node * job.cpus_per_task, "gpus": job.gpus_per_node}
    for what, needed in needs.items():
        most = sorted((getattr(node, what) for node in there), reverse=True)[: job.nodes]
        if len(most) < job.nodes or most[-1] < needed:
            raise InputError(
                f"the job needs {job.nodes} nodes with {needed} {what.upper()} each; partition {name} has "
                f"{len(there)}, the largest with {', '.join(map(str, most))}"
            )
    return f"partition {name}: {job.nodes} of {len(there)} nodes, at most {limits['MaxTime']}"


def check_batch(cfg: DictConfig, job: Job) -> str:
    """Compare the config's devices and rows per step with the job's, and return the arithmetic of an optimizer step."""
    asked = {"devices": job.tasks_per_node, "num_nodes": job.nodes}
    for name, there in asked.items():
        if cfg.trainer[name] != there:
            raise InputError(
                f"trainer.{name}={cfg.trainer[name]} but the job has {there}; set slurm.nodes and slurm.gpus_per_node"
            )
    if job.gpus_per_node == 0 and cfg.trainer.accelerator != "cpu":
        raise InputError(
            f"slurm.gpus_per_node=0 with trainer.accelerator={cfg.trainer.accelerator}; train on cpu or ask for GPUs"
        )
    shared = cfg.sequence_parallel_size
    parallel, left = divmod(job.nodes * job.tasks_per_node, shared)
    if left:
        raise InputError(
            f"sequence_parallel_size={shared} does not divide {job.nodes} × {job.tasks_per_node} processes"
        )
    micro, accumulate = cfg.datamodule.micro_batch_size, cfg.trainer.accumulate_grad_batches
    rows = micro * accumulate * parallel
    said = (
        f"{micro} rows × {accumulate} micro-batches × {parallel} groups of {shared} processes = "
        f"{rows} rows, {rows * cfg.sequence_length:,} tokens a step"
    )
    if cfg.rows_per_step is not None and cfg.rows_per_step != rows:
        fitting, left = divmod(cfg.rows_per_step, micro * parallel)
        advice = (
            "no trainer.accumulate_grad_batches makes it" if left else f"set trainer.accumulate_grad_batches={fitting}"
        )
        raise InputError(f"rows_per_step={cfg.rows_per_step} but {said}: {advice}")
    return said


def check_model(cfg: DictConfig, job: Job) -> str:
    """Refuse a hub model whose weights are not in the cache if the nodes are offline; a folder was checked before."""
    path = cfg.model.get("path")
    if path is None or Path(path).is_dir():
        return path or "from scratch"
    if job.offline:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, revision=cfg.model.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not list(folder.glob("*.safetensors")):
            raise InputError(
                f"model.path={path} is not in the cache and the nodes are offline; fetch it here: hf download {path}"
            )
    return str(path)


def check_disk(run_dir: Path, needed: float) -> str:
    """Compare the free disk with the size of the run's checkpoints and export."""
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"run_dir={run_dir}: the checkpoints need {needed / GIB:.1f} GiB, {free / GIB:.1f} are free; choose "
            "another disk, or keep fewer with callbacks.checkpoint.num_kept"
        )
    return f"{needed / GIB:.1f} GiB for checkpoints and export, {free / GIB:.1f} GiB free"


def check_data(cfg: DictConfig, recipe: Any) -> str:
    """Tokenize the corpus, so that no node has to, and refuse one too small for a step or an evaluation."""
    datamodule = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")
    datamodule.prepare_data()
    world = cfg.trainer.devices * cfg.trainer.num_nodes
    datamodule.trainer = SimpleNamespace(
        world_size=world, global_rank=0, accumulate_grad_batches=cfg.trainer.accumulate_grad_batches, global_step=0
    )
    datamodule.setup("fit")
    if cfg.evaluation:
        check_tasks(cfg, recipe.config(), datamodule)
    return f"{len(datamodule.train_documents):,} documents to train on, tokens in {cfg.datamodule.cache_dir}"
