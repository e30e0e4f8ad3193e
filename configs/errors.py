"""The exception whose message users see, and helpers for writing such messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input or a wrong setting. The message says in one line which file or key is wrong, why, and what to do.

    The command line prints the message without a traceback and exits with code 2. Every package raises this class or a
    subclass for anything that a user can fix; any other exception is a bug. Since a message may quote file names or
    contents with any characters, it is made printable.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return `text` as one printable line.

    Line breaks, terminal sequences, bidirectional controls and lone surrogates are escaped.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` names and how many more there are, as in `a, b, c and 5 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def one_line(error: BaseException | str, most: int | None = 160) -> str:
    """Return the text of an exception, or any other text, as one line of at most `most` characters.

    With `most=None` the text is not shortened. For an exception without a text, the name of its type is returned.
    """
    text = " ".join(str(error).split())[:most]
    return text or (type(error).__name__ if isinstance(error, BaseException) else "")


def type_and_line(error: BaseException, most: int = 160) -> str:
    """Return the type and the text of an exception as one line: `OSError: [Errno 5] Input/output error`."""
    text = one_line(str(error), most)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `; did you mean resnet50?`, or an empty text if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
