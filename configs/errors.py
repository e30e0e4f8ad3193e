"""The one exception a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a wrong setting: says which file or key, what is wrong and what to do, in one line.

    The command line prints it without a traceback and exits with code 2. Every room raises this class or a
    subclass of it for anything a user can mend; any other exception is a bug.
    """
