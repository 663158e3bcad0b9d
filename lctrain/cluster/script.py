"""The job script: a template of slurm/ with this job's options, environment and arguments filled in."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lctrain.cluster.job import Job
from lctrain.config import root

OFFLINE = "export HF_HUB_OFFLINE=1 WANDB_MODE=offline # compute nodes reach no internet; upload later with wandb sync"


def job_script(job: Job, run_dir: Path, arguments: Sequence[str]) -> str:
    """The text of run_dir/job.sbatch, which `sbatch` takes as it is.

    The same as slurm/<template>.sbatch but for the #SBATCH lines, the environment, the arguments, and that what it
    sources stands in it.
    """
    folder = root() / "slurm"
    text = (folder / f"{job.template}.sbatch").read_text()
    options = "".join(
        f"#SBATCH --{name}{'' if value is None else f'={value}'}\n" for name, value in job.directives(run_dir)
    )
    text = re.sub(r"(^#SBATCH .*\n)+", lambda _: options, text, flags=re.MULTILINE)
    text = re.sub(
        r"^#   sbatch .*", lambda _: f"#   sbatch {shlex.quote(str(run_dir / 'job.sbatch'))}", text, flags=re.MULTILINE
    )
    text = re.sub(
        r"(^export .*\n)+", lambda _: "".join(f"{line}\n" for line in _environment(job)), text, flags=re.MULTILINE
    )
    text = re.sub(r"^max_restarts=.*", f"max_restarts={job.max_restarts}", text, flags=re.MULTILINE)
    body = (folder / "train.sh").read_text().partition("\n")[2]  # without its line for shellcheck
    given = "\n".join(_arguments(job, run_dir, arguments))
    return text.replace('source slurm/train.sh "$@"\n', f"{given}\n\n{body}")


def _environment(job: Job) -> Iterator[str]:
    yield from job.setup
    yield f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    if job.offline:
        yield OFFLINE


def _arguments(job: Job, run_dir: Path, arguments: Sequence[str]) -> Iterator[str]:
    words = shlex.join(arguments)
    if job.array is None:
        yield f"run_dir={shlex.quote(str(run_dir))}"
    else:
        yield f"run_dir={shlex.quote(str(run_dir))}/$SLURM_ARRAY_TASK_ID"
        words += " seed=$SLURM_ARRAY_TASK_ID"
    yield f'set -- {words} "$@"'
