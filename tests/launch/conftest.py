"""`lctrain` as a user starts it: in a process of its own, from any folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Completed = subprocess.CompletedProcess[str]


@pytest.fixture
def lctrain(tmp_path: Path) -> Callable[..., Completed]:
    """Runs `lctrain <arguments>` in an empty folder; environment variables as keywords."""

    def run(*arguments: str, **environment: str) -> Completed:
        command = [sys.executable, "-m", "launch", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
        )

    return run
