"""The exceptions that are told to the user in one line, without a traceback."""


class InputError(ValueError):
    """What the user gave is wrong: what, where, and what to do. The command line exits with 2."""


class DoesNotFit(InputError):
    """More memory is needed than there is, whatever is saved."""


class RunError(RuntimeError):
    """The input was fine, the run could not go on (interrupted, diverged, disk full). The command line exits with 1."""


class Stopped(RunError):
    """The run was asked to stop and kept what was done. The command line exits with 75, as in "try again"."""
