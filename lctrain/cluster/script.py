"""The job script: a template from slurm/ with the job's options, environment and arguments filled in."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lctrain.cluster.job import Job
from lctrain.config import root

OFFLINE = "export HF_HUB_OFFLINE=1 WANDB_MODE=offline # compute nodes reach no internet; upload later with wandb sync"


def job_script(job: Job, run_dir: Path, arguments: Sequence[str]) -> str:
    """Return the text of run_dir/job.sbatch, which `sbatch` takes as it is.

    The text is slurm/<template>.sbatch with the job's #SBATCH lines and environment. A line that sets the `arguments`
    and the content of the file that the template sources replace the template's `source` line.
    """
    folder = root() / "slurm"
    text = (folder / f"{job.template}.sbatch").read_text()
    options = (f"#SBATCH --{name}{'' if value is None else f'={value}'}" for name, value in job.directives(run_dir))
    text = _replaced(text, r"#   sbatch .*", [f"#   sbatch {shlex.quote(str(run_dir / 'job.sbatch'))}"])
    text = _replaced(text, r"#SBATCH .*", options)
    text = _replaced(text, r"export .*", _environment(job, run_dir))
    text = _replaced(text, r"max_restarts=.*", [f"max_restarts={job.max_restarts}"])
    source = re.compile(r'source slurm/(\w+\.sh) "\$@"\n')
    body = (folder / source.search(text)[1]).read_text().partition("\n")[2]  # type: ignore[index]  # without shellcheck's line
    return source.sub(lambda _: f'set -- {shlex.join(arguments)} "$@"\n\n{body}', text)


def _replaced(text: str, line: str, new: Iterator[str] | Sequence[str]) -> str:
    """Replace each block of lines that match `line` by the `new` lines."""
    return re.sub(rf"(?:^{line}\n)+", lambda _: "".join(f"{each}\n" for each in new), text, flags=re.MULTILINE)


def _environment(job: Job, run_dir: Path) -> Iterator[str]:
    yield from job.setup
    yield f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    if job.offline:
        yield OFFLINE
    yield f"run_dir={shlex.quote(str(run_dir))}"
