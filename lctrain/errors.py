"""Define the exceptions that are shown to the user in one line, without a traceback."""


class InputError(ValueError):
    """An error in the user's input. It says what is wrong, where, and what to do. The command line exits with 2."""


class DoesNotFit(InputError):
    """A refusal of a run that needs more memory than there is, with any choice of savings."""


class RunError(RuntimeError):
    """An end of a run with valid input (interrupted, diverged, disk full). The command line exits with 1."""


class Stopped(RunError):
    """An end of a run that was asked to stop, after it saved its work. The command line exits with 75 ("try again")."""
