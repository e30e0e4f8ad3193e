"""Hostile inputs: random bytes, valid files with damage, and text made of a format's own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

MOST_BYTES = 400_000
# Numbers, texts and bytes that often break programs that read files.
ODD_TEXTS = (
    "", " ", "\t", "\n", "\r\n", "\r", "\0", "\x1b[31m", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff",
    "\u202e", "\U0001f52a", "e\u0301", "\u0660\u0661", "\u00b2", "\uff11", "-1", "-0", "0", "1", "00", "1e400", "nan",
    "1e-400", "inf", "-Infinity", "NaN", "null", "~", "true", "0x10", "1_000", "9" * 20, "9" * 400, "9" * 5000, "1.5",
    "1,5", "9007199254740993", "4611686018427387904", "../../etc/passwd", "/etc/passwd", "C:\\x", "[" * 200,
    "{" * 200, "(" * 50, "%s%n", "{0}", "<script>alert(1)</script>", "[/red]",
    "*a", "&a [*a, *a]", "<<: *a", "!!python/object/apply:os.system ['x']", "!!timestamp x", "!!int x", "!!bool x",
    "!!float x", "!!binary x", "? [a]\n: b", "---\n", "...\n", "'", '"', "\\", "\\ud800", "\ud7ff",
)  # fmt: skip
ODD_BYTES = (
    *(text.encode() for text in ODD_TEXTS),
    b"\xff", b"\xfe\xff", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x00\x00\x00\x00\x01\x00\x00\x00",
)  # fmt: skip

Change = tuple[str, float, float, bytes]
_CHANGES: st.SearchStrategy[Change] = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "cut", "repeat", "swap", "number"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(ODD_BYTES), st.binary(min_size=1, max_size=8)),
)


def changed(content: bytes, changes: Sequence[Change]) -> bytes:
    """`content` after all changes, one after the other; positions are fractions of its length at that point."""
    for kind, one, other, odd in changes:
        at, size = int(one * len(content)), max(1, int(other**4 * len(content) / 2))
        head, tail = content[:at], content[at:]
        if kind == "flip":
            content = head + bytes([tail[0] ^ (1 << int(other * 8))]) + tail[1:] if tail else head
        elif kind == "set":
            content = head + odd + tail[len(odd) :]
        elif kind == "insert":
            content = head + odd + tail
        elif kind == "delete":
            content = head + tail[size:]
        elif kind == "cut":
            content = head
        elif kind == "repeat":
            content = head + tail[:size] * 2 + tail[size:]
        elif kind == "swap":
            to = int(other * len(content))
            first, second = sorted((at, to))
            content = content[second:] + content[first:second] + content[:first]
        else:
            content = _other_number(content, at, odd)
    return content[:MOST_BYTES]


def _other_number(content: bytes, at: int, odd: bytes) -> bytes:
    """Replace the next run of digits from `at` on, like a field of a text format."""
    digits = b"0123456789"
    start = next((i for i in range(at, min(len(content), at + 200)) if content[i] in digits), None)
    if start is None:
        return content
    stop = start
    while stop < len(content) and content[stop] in digits:
        stop += 1
    return content[:start] + odd + content[stop:]


def mutations(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """A valid file with one to four changes."""
    return st.builds(changed, st.sampled_from(seeds), st.lists(_CHANGES, min_size=1, max_size=4))


def texts(words: Sequence[str], marks: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Text of a format's words and marks, mixed with unusual ones."""
    word = st.one_of(st.sampled_from(words), st.sampled_from(ODD_TEXTS), st.integers(-2, 100).map(str))
    piece = st.tuples(word, st.sampled_from(marks)).map("".join)
    return st.lists(piece, max_size=30).map(lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass"))


def hostile_inputs(
    seeds: Sequence[bytes],
    words: Sequence[str] = (),
    marks: Sequence[str] = ("\t", "\n"),
    mend: Callable[[bytes], bytes] | None = None,
) -> st.SearchStrategy[bytes]:
    """All of the above; with `mend` also damage with corrected checksums, as an attacker would make it."""
    kinds = [mutations(seeds), mutations(seeds), st.binary(max_size=300)]
    if words:
        kinds.append(texts(words, marks))
    if mend is not None:
        kinds += [mutations(seeds).map(mend)] * 2
    return st.one_of(kinds)
