"""Pickles of unknown origin: plain values are returned unchanged, anything else is refused before it is executed."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.safe_pickle as safe_pickle
from configs.errors import UserError
from engine.safe_pickle import load_plain

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=3)
    ),
    max_leaves=20,
)
INDEX = [[["/data/17/17-1.jpg", 1, 0, 0, 0, 0, 0, 0, 3], ["/data/17/17-2.jpg", 0, 0, 1, 0, 0, 0, 0, 4]]]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def call(content: bytes, tensors: bool = False) -> Any:
        (tmp_path / "a.pkl").write_bytes(content)
        return load_plain(tmp_path / "a.pkl", tensors=tensors)

    return call


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert "a.pkl: " in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what is read


@settings(max_examples=150, deadline=None)
@given(value=VALUES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), tensors=st.booleans())
def test_plain_values_are_equal_in_every_protocol(
    tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int, tensors: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert repr(load_plain(path, tensors=tensors)) == repr(value)  # types too: True is not 1


def test_pickles_of_python_2(load: Callable[..., Any]) -> None:
    text = b"(lp0\n(lp1\nS'/data/17/17-1.jpg'\np2\naI1\naI01\naL3L\naF0.5\naNa(I1\nI2\ntp3\naV\\u00e9\np4\naa."
    assert load(text) == [["/data/17/17-1.jpg", 1, True, 3, 0.5, None, (1, 2), "é"]]
    assert load(b"\x80\x02]q\x00U\x05a\xe9.jpq\x01a.") == ["aé.jp"]


def test_an_index_of_all_of_cholec80_is_within_the_limits() -> None:
    frames, instructions = 184_498, 15  # a row: a list, a path, nine numbers and what keeps them
    assert 4 * frames * instructions < safe_pickle.MAX_INSTRUCTIONS
    assert 4 * frames < safe_pickle.MAX_CONTAINERS


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_single_numbers_of_torch_and_numpy_are_numbers(load: Callable[..., Any], protocol: int) -> None:
    batch = torch.arange(12).reshape(4, 3)
    value = [
        batch[2, 1],
        torch.tensor(-1.5),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(True),
        batch[1],
        batch[:, 1],
        torch.zeros(0),
        np.int64(-3),
        np.float32(0.25),
        np.bool_(True),
        np.uint8(200),
    ]
    expected = [7, -1.5, 2.5, 7, True, [3, 4, 5], [1, 4, 7, 10], [], -3, 0.25, True, 200]
    content = pickle.dumps(value, protocol)
    assert repr(load(content, tensors=True)) == repr(expected)
    assert "nothing in it was run" in refusal(load, content)


def test_tensors_as_torch_0_3_wrote_them(load: Callable[..., Any]) -> None:
    rebuild = b"ctorch._utils\n_rebuild_tensor\n"
    storage = b"(ctorch.cuda\nLongStorage\n((lp1\nI4\naI5\naI6\natR"
    assert load(b"(lp0\n" + rebuild + storage + b"I1\n(t(ttR" + b"a.", tensors=True) == [5]


def test_no_function_of_torch_or_numpy_is_called(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([torch.tensor(3), np.int64(4)], 2)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    for place, name in (
        (torch, "load"),
        (torch.storage, "_load_from_bytes"),
        (torch._utils, "_rebuild_tensor_v2"),
        (torch._utils, "_rebuild_tensor"),
    ):
        monkeypatch.setattr(place, name, fail)
    assert load(content, tensors=True) == [3, 4]


# ---------------------------------------------------------------------------------------------- what is refused


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: [[1, {"a": (evil,)}]]], ids=["bare", "nested"])
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), "system'"),
        (lambda mark: Calls(eval, f"open({mark!r}, 'w')"), "eval'"),
        (lambda mark: Calls(exec, f"open({mark!r}, 'w')"), "exec'"),
        (lambda mark: Calls(open, mark, "w"), "open'"),
        (lambda mark: Calls(getattr, "os", "system"), "getattr'"),
        (lambda mark: Calls(torch.load, mark), "'torch.serialization.load'"),
        (lambda mark: np.zeros(3), ""),
    ],
    ids=["system", "eval", "exec", "open", "getattr", "torch.load", "array"],
)
def test_nothing_is_run(
    load: Callable[..., Any],
    tmp_path: Path,
    evil: Callable[[str], Any],
    named: str,
    wrap: Callable[[Any], Any],
    protocol: int,
    tensors: bool,
) -> None:
    mark = tmp_path / "mark"
    try:
        content = pickle.dumps(wrap(evil(str(mark))), protocol)
    except TypeError:
        pytest.skip("Python does not write it")
    message = refusal(load, content, tensors)
    assert named in message
    assert "nothing in it was run" in message
    assert not mark.exists()


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"(S'touch mark'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch mark'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02cos\nsystem\n(tR.",
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x07os\nevil\x8c\x06system\x93.",
        b"P1\n.",
        b"K\x01Q.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"]}b.",
        b"]}K\x01K\x02sb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}(S'_build'\nK\x01ub.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}(S'_build'\nK\x01u\x86b.",
        b"cnumpy\ndtype\n(S'O'\nI00\nI01\ntR.",
        b"cnumpy\ndtype\n(S'f8'\nI00\nI01\ntR.",
        b"cnumpy\ndtype\n(S'f8'\nI00\nI01\ntR(I3\nS'x'\ntb.",
        b"ctorch.storage\n_load_from_bytes\n(S'abc'\ntR.",
        b"ctorch\nLongStorage\n(](K\x01K\x02etR.",
        b"ctorch\nLongStorage\n(S'abc'\ntR.",
        b"ctorch.nn\nModule\n)R.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"cengine.safe_pickle\nload_plain\n(S'a.pkl'\ntR.",
    ],
)
def test_every_other_way_to_refer_to_code_is_refused(load: Callable[..., Any], content: bytes, tensors: bool) -> None:
    refusal(load, content, tensors)


def test_a_storage_with_code_in_it_is_refused(load: Callable[..., Any], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for inner in (Calls(os.system, f"touch {mark}"), {"a": 1}, torch.ones(2), torch.nn.Linear(1, 1)):
        content = pickle.dumps([Calls(torch.storage._load_from_bytes, torch_file(inner))], 2)
        refusal(load, content, tensors=True)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    "arguments",
    [
        (1, (), ()),
        (0, (2,), (1,)),
        (-1, (), ()),
        (0, (1,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (1, 1), (1, 1)),
        (0, (-1,), (1,)),
        (0, (1,), ()),
        ("0", (), ()),
        (0, [1], [1]),
    ],
)
def test_a_tensor_cannot_read_outside_its_storage(load: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    storage = torch.tensor([5]).storage()
    content = pickle.dumps(Calls(torch._utils._rebuild_tensor, storage, *arguments), 2)
    refusal(load, content, tensors=True)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_an_empty_tensor_is_an_empty_list(load: Callable[..., Any]) -> None:
    storage = torch.arange(9).storage()
    for stride in (0, 1, 5):
        content = pickle.dumps(Calls(torch._utils._rebuild_tensor, storage, 0, (0,), (stride,)), 2)
        assert load(content, tensors=True) == []


def test_whole_tensors_are_no_predictions(load: Callable[..., Any]) -> None:
    assert "whole tensors" in refusal(load, pickle.dumps([torch.zeros(2, 7)]), tensors=True)
    assert "whole tensors" in refusal(load, pickle.dumps([torch.zeros(5000)]), tensors=True)
    refusal(load, pickle.dumps(collections.OrderedDict(a=torch.zeros(1), b=os.system)), tensors=True)


# ---------------------------------------------------------------------------------------------- damage and bombs


def test_every_truncation_is_one_line(load: Callable[..., Any]) -> None:
    for content in (pickle.dumps(INDEX, 2), pickle.dumps(INDEX, 0), pickle.dumps([torch.tensor(1)], 2)):
        for length in range(len(content)):
            refusal(load, content[:length], tensors=True)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty file"),
        (b"\n <!DOCTYPE html><html>", "web page"),
        (b"<html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"PK\x03\x04abc", "ZIP archive"),
        (b"Frame Phase\n0\tPreparation\n", "not a pickle"),
        (b"\x00" * 1000, "not a pickle"),
        (b"\x89PNG\r\n", "nothing in it was run"),
    ],
)
def test_other_files_are_recognised(load: Callable[..., Any], content: bytes, what: str) -> None:
    assert what in refusal(load, content)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_plain(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="cannot be read"):
        load_plain(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(INDEX))
    monkeypatch.setattr(safe_pickle, "MAX_FILE_BYTES", 10)
    assert "larger than" in refusal(load_plain, tmp_path / "a.pkl")


def doubled(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 16 GB
        b"]p99999999999\n.",
        b"]p-1\n.",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"abc.",
        b"\x80\x04X\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"].",
        b"I" + b"9" * 100_000 + b"\n.",
        b"L" + b"9" * 4000 + b"L\n.",
        b"\x80\x02\x8a\x09" + b"\x7f" * 9 + b".",
        pickle.dumps(doubled(60), 2),
        b"]q\x00h\x00a.",  # a list that contains itself
        b"]q\x00}q\x01K\x01h\x00sa.",
        b"(" * 100_000 + b".",
        b"]" * 300_000 + b"a" * 299_999 + b"a.",
    ],
)
def test_bombs_are_refused_at_once(load: Callable[..., Any], content: bytes) -> None:
    refusal(load, content)


def test_a_key_of_nested_tuples_is_refused_before_it_is_hashed(load: Callable[..., Any]) -> None:
    assert "tuples" in refusal(load, b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.")


REBUILDING_BOMBS = {
    # one string of a megabyte, encoded again and again
    "encode": b"\x80\x02X"
    + struct.pack("<I", 1 << 20)
    + b"a" * (1 << 20)
    + b"q\x00X\x06\x00\x00\x00latin1q\x010]"
    + b"("
    + b"c_codecs\nencode\nh\x00h\x01\x86R" * 1500
    + b"e.",
    # a list that doubles at every level, given to a storage
    "storage": b"\x80\x02ctorch\nLongStorage\nK\x01q\x00"
    + b"".join(b"(h%sh%slq%s" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(24))
    + b"\x85R.",
}


@pytest.mark.parametrize("name", REBUILDING_BOMBS)
def test_rebuilding_allocates_no_more_than_a_file_explains(name: str, load: Callable[..., Any]) -> None:
    refusal(partial(load, tensors=True), REBUILDING_BOMBS[name])


def test_values_are_counted_before_allocation(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([[] for _ in range(1000)], 2)
    monkeypatch.setattr(safe_pickle, "MAX_CONTAINERS", 1000)
    assert "more values" in refusal(load, content)
    monkeypatch.setattr(safe_pickle, "MAX_CONTAINERS", 1001)
    assert len(load(content)) == 1000
    monkeypatch.setattr(safe_pickle, "MAX_INSTRUCTIONS", 999)
    assert "more values" in refusal(load, content)


def test_nested_lists_are_read_unless_they_are_too_deep(load: Callable[..., Any]) -> None:
    assert load(b"]" * 101 + b"a" * 100 + b".") == functools.reduce(lambda value, _: [value], range(100), [])
    assert load(pickle.dumps(doubled(10), 2)) == doubled(10)
    assert "too deeply nested" in refusal(load, b"]" * 50_001 + b"a" * 50_000 + b".")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), tensors=st.booleans())
def test_damaged_bytes_are_an_error_or_plain(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tensors: bool
) -> None:
    whole = pickle.dumps([*INDEX, torch.tensor(3), np.float64(1.5)] if tensors else INDEX, 2)
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    try:
        message = repr(load_plain(path, tensors=tensors)) and ""
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
