"""Queue a run on a Slurm cluster: check it, snapshot its code, and requeue it until it finishes.

Before anything is queued, the model's and the data's files are checked, the data is tokenized, and the memory of a GPU,
the free disk and the partition's limits are compared with what the run needs. run_dir then receives code/ (a copy that
the job runs, so that later edits do not change it), job.yaml, config.yaml, job.sbatch and, once it runs, the job's log.

A job that is asked to stop (time limit, preemption) writes a checkpoint and is queued again; a job that fails is tried
again from its newest checkpoint. Accepts every group and option of `lctrain train`; slurm.* are the job's own.

examples:
  lctrain submit experiment=demo run_dir=runs/demo slurm.partition=gpu slurm.time=1:00:00
  lctrain submit experiment=longlora_7b_32k slurm.nodes=2 slurm.gpus_per_node=8 slurm.time=24:00:00 run_dir=runs/7b
  lctrain submit experiment=demo run_dir=runs/demo --dry-run
  lctrain submit experiment=demo run_dir=runs/seeds slurm.array=0-3 slurm.dependency=afterok:1234
  lctrain submit evaluate model.path=runs/7b/exported run_dir=runs/7b-evaluated slurm.array=[32,64,128]
"""

from omegaconf import DictConfig

WORDS = {"--dry-run": "dry_run=true", "evaluate": "--config-name=submit_evaluate"}  # words that stand for an option


def run(cfg: DictConfig) -> None:
    from lctrain.cluster.submit import main

    main(cfg)
