"""What the shell learns: 0 done, 2 the input was wrong, 75 stopped on request with a checkpoint, 1 anything else."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lctrain import config
from lctrain.errors import RunError, Stopped


@contextmanager
def exit_codes(verb: str, overrides: Sequence[str]) -> Iterator[None]:
    """Turns what the user did wrong, or the world did to the run, into one line; bugs keep their traceback."""
    try:
        yield
    except Stopped as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun ends the ranks when the first has left
        print(error, file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from None
    except (RunError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted'}")  # a text: printed to stderr, exit code 1
    except Exception as error:
        if (refusal := config.explain(error, verb, overrides)) is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None
