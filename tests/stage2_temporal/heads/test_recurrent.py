"""The arithmetic that LSTM and GRU get on CUDA, with fake tensors: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from configs.head_settings import GruHead, LstmHead
from configs.schema import JointNetConfig
from stage1_cnn.encoders.backbone import build_backbone
from stage2_temporal.heads import recurrent
from stage2_temporal.heads.base import build_head
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.net import build_joint
from stage2_temporal.model import PhaseModel
from tests.waits import start_autograd

WIDTH, HIDDEN, PHASES = 8, 4, 3


class FakeCudnn(TorchDispatchMode):
    """torch's recurrent networks on fake CUDA tensors; `types` are those of input and state in each call of cuDNN.

    It takes the place of torch's C++ function, which asks the driver before it calls `_cudnn_rnn`.
    """

    def __init__(self) -> None:
        super().__init__()
        start_autograd()
        self.tensors = FakeTensorMode(allow_non_fake_inputs=True)
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._cudnn_rnn.default:
            x, h, c = args[0], args[4], args[5]
            self.types |= {part.dtype for part in (x, h, c) if part is not None}
        return func(*args, **(kwargs or {}))

    def run(self, mode: int, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        """As `torch._VF.lstm` (`mode` 2) and `torch._VF.gru` (3), which take batch sizes if x is packed."""
        packed = isinstance(given[2], list)
        sizes, state, weights = given[:3] if packed else ([], *given[:2])
        _, layers, dropout, training, bidirectional, *batch_first = given[3:] if packed else given[2:]
        h, c = state if mode == 2 else (state, None)
        steps = [int(size) for size in sizes]
        # the weights in fp16 already: autocast would copy fp32 ones by the driver
        with self.tensors, self:
            halves = [weight.half() for weight in weights]
            flags = (bool(batch_first and batch_first[0]), dropout, training, bidirectional)
            call = torch._cudnn_rnn
            found = call(x, halves, 4, None, h, c, mode, HIDDEN, 0, layers, *flags, steps, None)
        return found[:3] if mode == 2 else found[:2]


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    fake = FakeCudnn()
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: None)
    monkeypatch.setattr(torch_rnn._VF, "lstm", partial(fake.run, 2), raising=False)
    monkeypatch.setattr(torch_rnn._VF, "gru", partial(fake.run, 3), raising=False)
    monkeypatch.setattr(recurrent, "pack_padded_sequence", _pack)
    monkeypatch.setattr(recurrent, "pad_packed_sequence", _pad)
    return fake


def _pack(x: Tensor, lengths: Tensor, **_: Any) -> PackedSequence:
    sizes = torch.tensor([int((lengths > step).sum()) for step in range(int(lengths.max()))])
    return PackedSequence(x.flatten(0, 1)[: int(lengths.sum())], sizes)


def _pad(packed: PackedSequence, total_length: int, **_: Any) -> tuple[Tensor, None]:
    return packed.data.new_zeros(int(packed.batch_sizes[0]), total_length, packed.data.shape[1]), None


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """As `torch.autocast("cuda", dtype)`, which switches itself off on a machine without CUDA."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "head", [LstmHead(hidden=HIDDEN, layers=2), GruHead(name="gru", hidden=HIDDEN, layers=2)], ids=["lstm", "gru"]
)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (None, torch.float32), (torch.float16, torch.float16)],
    ids=["bf16", "fp32", "fp16"],
)
def test_cudnn_computes_in_fp16_only_where_gradients_are_scaled(
    head: Any, lengths: Tensor | None, training: bool, dtype: Any, expected: torch.dtype, cudnn: FakeCudnn
) -> None:
    model = PhaseModel(Standardise.identity(WIDTH), build_head(head, WIDTH, PHASES)).train(training)
    with cudnn.tensors:
        model.to_empty(device="cuda")
        x = torch.zeros(2, 5, WIDTH, dtype=torch.float16, device="cuda")  # as features are stored
        state = (torch.zeros(2, 2, HIDDEN, device="cuda"),) * (2 if head.name == "lstm" else 1)
    with autocast(dtype):
        output = model(x, state, lengths)
        model(x, output.state, lengths)  # the state of one chunk enters the next
    assert cudnn.types == {expected}


def test_the_joint_nets_recurrence_is_fp32_under_bf16_autocast(cudnn: FakeCudnn) -> None:
    backbone = build_backbone("shufflenet_v2_x0_5", "random", 0)
    net = build_joint(backbone, JointNetConfig(mapping=True), LstmHead(hidden=HIDDEN, relu=True), 2, PHASES)
    with cudnn.tensors:
        net.to_empty(device="cuda")
        images = torch.zeros(2, 3, 3, 32, 32, device="cuda")
        state = (torch.zeros(2, 1, HIDDEN, device="cuda"),) * 2
    with cudnn.tensors, autocast(torch.bfloat16):
        output = net(images, state)
    assert cudnn.types == {torch.float32}
    assert output.tool_logits.dtype == output.mapped_logits.dtype == torch.bfloat16  # autocast is on around it
