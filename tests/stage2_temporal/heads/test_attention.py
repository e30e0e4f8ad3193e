"""Causal attention and key pooling against their equations, written out frame by frame in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from configs.head_settings import AttentionHead, KeyPoolingHead
from stage2_temporal.heads.attention import AttentionHead as Attention
from stage2_temporal.heads.base import Head, build_head
from stage2_temporal.heads.causal_attention import CausalAttention, window_mask
from stage2_temporal.heads.key_pooling import KeyPoolingHead as KeyPooling

D, C = 5, 4
SMALL: dict[str, Any] = {"width": 8, "heads": 2, "layers": 2}


def head_of(config: AttentionHead | KeyPoolingHead, seed: int = 0) -> Head:
    """A head in which every weight and bias is drawn, also those of the norms."""
    torch.manual_seed(seed)
    head = build_head(config, D, C).eval()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return head


def frames(batch: int, count: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


class WrittenOut:
    """The equations of docs/heads.md for one video, with rotary positions as complex numbers from its start."""

    def __init__(self, head: Head, heads: int, window: int) -> None:
        self.weights = {name: value.detach().double() for name, value in head.named_parameters()}
        self.heads, self.window = heads, window

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rotated(self, x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(*x.chunk(2))
        speed = 10_000.0 ** -(torch.arange(len(pairs)).double() / len(pairs))
        turned = pairs * torch.exp(1j * position * speed)
        return torch.cat([turned.real, turned.imag])

    def attention(self, name: str, x: Tensor) -> Tensor:
        query = self.linear(f"{name}.query", x).chunk(self.heads, dim=1)
        key, value = (part.chunk(self.heads, dim=1) for part in self.linear(f"{name}.key_value", x).chunk(2, dim=1))
        rows = []
        for t in range(len(x)):
            seen = range(max(0, t - self.window + 1), t + 1)
            parts = []
            for q, k, v in zip(query, key, value, strict=True):
                scores = [self.rotated(q[t], t) @ self.rotated(k[s], s) / q.shape[1] ** 0.5 for s in seen]
                share = torch.stack(scores).softmax(0)
                parts.append(sum(weight * v[s] for weight, s in zip(share, seen, strict=True)))
            rows.append(torch.cat(parts))
        return self.linear(f"{name}.leave", torch.stack(rows))

    def transformer(self, x: Tensor, layers: int) -> Tensor:
        y = self.linear("transformer.enter", x.double())
        for layer in range(layers):
            name = f"transformer.blocks.{layer}"
            y = y + self.attention(f"{name}.attention", self.norm(f"{name}.attention_norm", y))
            hidden = F.gelu(self.linear(f"{name}.feed_forward.0", self.norm(f"{name}.norm", y)))
            y = y + self.linear(f"{name}.feed_forward.3", hidden)
        return self.norm("transformer.norm", y)

    def key_pooling(self, local: Tensor) -> Tensor:
        keys, rows = self.linear("key", local), []
        for t in range(len(local)):
            largest = keys[: t + 1].max(dim=0).values
            past = self.norm("expanded_norm", F.relu(self.linear("expand", largest)))
            fused = self.norm("fused_norm", local[t] + past)
            mixed = self.norm("mixed_norm", F.relu(self.linear("mix", fused)))
            rows.append(self.norm("norm", fused + mixed))
        return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 4, 9, 30])
@pytest.mark.parametrize("kind", ["attention", "key_pooling"])
def test_the_equations(kind: str, window: int) -> None:
    kinds = {"attention": AttentionHead, "key_pooling": KeyPoolingHead}
    head, x = head_of(kinds[kind](name=kind, window=window, **SMALL)), frames(2, 13)
    with torch.no_grad():
        output = head(x)
    for row, found in zip(x, output.logits, strict=True):
        plain = WrittenOut(head, 2, window)
        hidden = plain.transformer(row, 2)
        if kind == "key_pooling":
            hidden = plain.key_pooling(hidden)
        torch.testing.assert_close(found.double(), plain.linear("fc", hidden), atol=1e-5, rtol=1e-5)


@given(
    window=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 34), unique=True, max_size=6),
    pooled=st.booleans(),
    alone=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_any_window_and_any_chunks(window: int, cuts: list[int], pooled: bool, alone: bool) -> None:
    """Windows shorter and longer than chunks and videos; `alone`: the first chunk is read frame by frame."""
    given_: Any = {"window": window, **SMALL, "layers": 1}
    head = head_of(
        KeyPoolingHead(name="key_pooling", **given_) if pooled else AttentionHead(name="attention", **given_)
    )
    x, state, parts = frames(1, 35), None, []
    with torch.no_grad():
        for part, chunk in enumerate(torch.tensor_split(x, sorted(cuts), dim=1)):
            for piece in chunk.split(1, dim=1) if alone and not part else [chunk]:
                output = head(piece, state)
                state = output.state
                parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), head(x).logits, atol=1e-5, rtol=1e-5)


@given(frames=st.integers(1, 20), slots=st.integers(0, 6), real=st.integers(0, 6), window=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_the_mask(frames: int, slots: int, real: int, window: int) -> None:
    slots = window - 1 if frames > window else min(slots, window - 1)
    real = min(real, slots)
    seen = window_mask(frames, slots, torch.tensor([real]), window)[0]
    blocks, size, keys = seen.shape
    assert (size, keys) == (min(frames, window), slots + min(frames, window))
    assert blocks * size >= frames > (blocks - 1) * size
    for t in range(blocks * size):
        first = t // size * size - slots  # the frame of the block's first key
        found = {first + int(key) for key in seen[t // size, t % size].nonzero()}
        assert found == set(range(max(-real, t - window + 1), t + 1))


@pytest.mark.parametrize("window", [64, 600])
def test_long_windows_are_finite(window: int) -> None:
    """Fused kernels divide keys into blocks, of which a query may see none."""
    torch.manual_seed(0)
    layer, x, empty = CausalAttention(4, 1, window), frames(1, 1300, width=4), torch.zeros(1, window - 1, 8)
    with torch.no_grad():
        found, _ = layer(x, empty, window_mask(1300, window - 1, torch.tensor([0]), window))
        query, key, value = torch.cat([layer.query(x), layer.key_value(x)], dim=2)[0].double().chunk(3, dim=1)
        turned = [
            torch.complex(*part.chunk(2, dim=1))
            * torch.exp(1j * torch.arange(1300.0).double()[:, None] * torch.tensor([1.0, 0.01]).double())
            for part in (query, key)
        ]
        scores = (turned[0] @ turned[1].conj().T).real / 2
        age = torch.arange(1300)[:, None] - torch.arange(1300)
        share = scores.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(dim=1)
        expected = layer.leave((share @ value).float())
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AttentionHead(name="attention", width=4, heads=1, layers=1, window=3, dropout=0),
        KeyPoolingHead(name="key_pooling", width=4, heads=2, layers=1, window=3, keys=2, dropout=0),
    ],
)
def test_gradients_by_differences(config: AttentionHead | KeyPoolingHead) -> None:
    head = head_of(config).double()
    before = head(frames(1, 4).double()).state
    *floats, whole = (*(part for part in before if part.is_floating_point()), frames(1, 5, seed=2).double())

    def logits(x: Tensor, *parts: Tensor) -> Tensor:
        values = iter(parts)
        given_ = tuple(next(values) if part.is_floating_point() else part for part in before)
        return head(x, given_).logits  # type: ignore[no-any-return]

    inputs = [part.detach().requires_grad_() for part in (whole, *floats)]
    assert torch.autograd.gradcheck(logits, inputs)


def test_a_layer_sees_its_window_and_layers_add_up() -> None:
    config = AttentionHead(name="attention", width=8, heads=2, layers=2, window=4)
    head, x = head_of(config), frames(1, 20).requires_grad_()
    head(x).logits[0, 15].sum().backward()
    assert x.grad is not None
    assert x.grad[0].any(dim=1).nonzero().flatten().tolist() == list(range(15 - 2 * 3, 16))


def test_key_pooling_reaches_beyond_the_window_and_keeps_negative_keys() -> None:
    config = KeyPoolingHead(name="key_pooling", width=8, heads=2, layers=1, window=2, keys=3)
    head, x = head_of(config), frames(1, 40).requires_grad_()
    assert isinstance(head, KeyPooling)
    head(x).logits[0, 39].norm().backward()
    assert x.grad is not None
    assert x.grad[0, :38].any()  # the frames with the largest keys, which the window does not reach
    torch.nn.init.constant_(head.key.bias, -50.0)  # a maximum that starts with zeros would never be exceeded
    found = head(x)
    assert bool((found.state[-1] < 0).all())
    torch.use_deterministic_algorithms(True)
    try:
        again = head(x)
        again.logits.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again.logits, found.logits)


def test_the_state_is_bounded_and_starts_small() -> None:
    """A clip that is shorter than the window keeps its own frames only, so that many short clips need little memory."""
    head = head_of(AttentionHead(name="attention", window=6, **SMALL))
    assert isinstance(head, Attention)
    with torch.no_grad():
        short, long = head(frames(3, 2)).state, head(frames(3, 50)).state
        _, stepped = head.step(frames(3, 1)[:, 0], short)
    assert [tuple(part.shape) for part in short] == [(3, 2, 16), (3, 2, 16), (3,)]
    assert [tuple(part.shape) for part in long] == [(3, 5, 16), (3, 5, 16), (3,)]
    assert [tuple(part.shape) for part in stepped] == [(3, 5, 16), (3, 5, 16), (3,)]
    assert (short[-1].tolist(), stepped[-1].tolist(), long[-1].tolist()) == ([2] * 3, [3] * 3, [5] * 3)


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"width 12 is not a multiple of 2 \* heads = 16"):
        AttentionHead(name="attention", width=12)
    with pytest.raises(ValidationError, match="width 18"):
        KeyPoolingHead(name="key_pooling", width=18, heads=6)
