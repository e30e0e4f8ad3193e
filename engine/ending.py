"""The message and the exit code with which a command ends after each kind of error."""

from __future__ import annotations

from pathlib import Path

import click

from configs.errors import UserError, one_line
from engine.files import as_user_error
from engine.processes import is_reporting_rank, nccl_failure, peer_died
from engine.stopping import Stopped, StoppedAtOnce

EXIT_BAD_INPUT = 2
EXIT_LOST_ANOTHER = 70  # another process of the same training has failed (EX_SOFTWARE of sysexits.h)


def report(error: BaseException) -> int | None:
    """Print one line about an expected error, and return the exit code; None for a bug, whose traceback is needed."""
    if isinstance(error, OSError):
        error = as_user_error(error, Path(str(error.filename or "output")))
    line, code = _line_and_code(error)
    if code is not None and is_reporting_rank(error):  # of several processes, only one reports why all end
        click.echo(line, err=True)
    return code


def _line_and_code(error: BaseException) -> tuple[str, int | None]:
    if isinstance(error, UserError):
        return f"error: {error}", EXIT_BAD_INPUT
    if isinstance(error, Stopped):
        return f"{error}; progress is saved, and the same command resumes from there", error.exit_code
    if isinstance(error, StoppedAtOnce):
        return f"{error}; no file is left incomplete; start the same command again", error.exit_code
    if peer_died(error):
        return f"error: another process of this training has ended ({one_line(error)})", EXIT_LOST_ANOTHER
    if failure := nccl_failure(error):
        return f"error: {failure}", EXIT_BAD_INPUT
    return "", None
