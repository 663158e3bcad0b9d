"""Exit codes: 0 done, 2 the input was wrong, 75 stopped on request with a checkpoint, 1 anything else."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lctrain import config
from lctrain.errors import RunError, Stopped


@contextmanager
def exit_codes(verb: str, overrides: Sequence[str]) -> Iterator[None]:
    """Turn wrong input and failed runs into one line and an exit code; bugs keep their traceback."""
    try:
        yield
    except Stopped as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun sends SIGTERM to the other ranks when the first has exited
        print(error, file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from None
    except (RunError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted'}")  # a text: printed to stderr, exit code 1
    except Exception as error:
        if (refusal := config.explain(error, verb, overrides)) is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None
