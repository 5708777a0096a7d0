"""What the scripts share: data, stacked networks and their training, command line, results, plot style."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A mistake that the user can mend: shown as one line that says what to do, exit status 2, no traceback."""

    status = 2


class Failure(UserError):
    """What went wrong through nobody's mistake: one line as well, exit status 1."""

    status = 1
