"""Exported models give what torch gives, for every causal head, and nothing is written otherwise."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from configs import head_settings
from configs.errors import UserError
from configs.schema import Inference
from engine.stopping import Stopped, StopRequest
from features.frames.preprocess import preprocess_json
from live.export.model_file import export_model
from live.nets import Nets
from stage2_temporal.heads.base import HEADS, Head, HeadOutput, State
from tests.cli import PROJECT
from tests.live.export.tiny import LINEAR, D, Tools, decoded, nets_of

LSTM = head_settings.LstmHead(hidden=7, layers=2, relu=True, fc_hidden=5)
CAUSAL: list[Any] = [
    LINEAR,
    head_settings.GruHead(name="gru", hidden=7),
    head_settings.SsmHead(name="ssm", width=6, layers=1, head_width=4, state=3),
    head_settings.TransSvnetHead(name="trans_svnet", stages=1, layers=2, maps=5, window=7, width=8),
    head_settings.AttentionHead(name="attention", width=8, heads=2, window=6, layers=1),
    head_settings.KeyPoolingHead(name="key_pooling", width=8, heads=2, window=4, keys=3, layers=1),
]
TCN = head_settings.TcnHead(name="tcn", stages=2, layers=2, maps=5)
# clips of five frames; two label tracks and no tools; tools as inputs of the head; tools from a probe
CASES: list[tuple[Any, Inference, str, Tools]] = [(head, "carried", "cholec80", "head") for head in CAUSAL]
CASES += [(LSTM, "clip", "cholec80", "inputs"), (TCN, "carried", "multibypass140", "head")]
CASES[1] = (CASES[1][0], "carried", "cholec80", "probe")


def test_every_causal_head_is_tried() -> None:
    names = {head.name for head, *_ in CASES}
    assert names == set(HEADS.names()) - {"mstcn++"}


@pytest.mark.parametrize(("head", "inference", "dataset", "tools"), CASES, ids=lambda case: getattr(case, "name", case))
def test_every_causal_head_agrees_frame_by_frame(
    head: Any, inference: Inference, dataset: str, tools: Tools, tmp_path: Path
) -> None:
    nets = nets_of(head, inference, 5, dataset, tools)
    found = export_model(nets, tmp_path / "net.onnx", StopRequest()).result["check"]
    assert found["agrees"]
    tracks = ["phases", *(f"track_{name}" for name in nets.spec.tracks)]
    assert set(found["largest_difference"]) == {*tracks, "embedding", *(["tools"] if nets.spec.tools else [])}
    assert set(found["end_to_end"]) == set(tracks)
    assert max(found["largest_difference"].values()) <= 1e-5
    assert max(found["end_to_end"].values()) <= 1e-3  # an embedding may be rounded to the next float16
    assert max(found["largest_difference"].values()) > 0  # two libraries, which do not give the same bits


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    nets = decoded(nets_of(LSTM), mode="causal", lag_s=1.2, tool_smoothing_s=3.0)
    assert nets.decoding is not None
    nets = replace(nets, config=nets.config.model_copy(update={"temporal": _with_decoding(nets)}))
    path = tmp_path / "new folder" / "net.onnx"
    export_model(nets, path, StopRequest())
    content, beside = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert beside["sha256"] == sha256(content).hexdigest()
    assert beside["bytes"] == len(content)
    for place in (str(PROJECT), str(tmp_path), "site-packages", ".py"):
        assert place.encode() not in content
    model = onnx.load(path)
    assert model.opset_import[0].version >= 20
    about = json.loads(next(one.value for one in model.metadata_props if one.key == "surgstage"))
    assert about == beside["made_by"]["model"]
    session = onnxruntime.InferenceSession(content)
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "frame": [1, 3, 32, 32],
        **{one["input"]: one["shape"] for one in about["state"]},
    }
    assert [one["track"] for one in about["tracks"]] == ["phases"]
    assert about["tracks"][0]["classes"] == list(nets.spec.phases)
    assert about["tools"]["classes"] == list(nets.spec.tools)
    assert about["preprocess"].items() >= preprocess_json(nets.config.preprocess).items()
    assert (about["fps"], about["inference"], about["hashes"]) == (2.0, "carried", nets.weights)
    decoding, fitted = about["decoding"], nets.decoding.fitted.tracks["phases"]
    assert (decoding["mode"], decoding["lag_frames"]) == ("causal", 2)
    phases = decoding["tracks"]["phases"]
    assert phases["temperature"] == 1.6
    assert phases["filter"]["weight"] == pytest.approx(0.15)
    assert phases["graph"] == json.loads(json.dumps(fitted.graph.to_json()))
    np.testing.assert_allclose(phases["filter"]["matrix"], fitted.graph.matrix(2.0))
    assert phases["viterbi"]["chain_frames"] == fitted.graph.chain_frames(4.0, 2.0).tolist()
    assert about["tool_smoothing"] == {"time_s": 3.0, "keep": pytest.approx(np.exp(-1 / 6))}


def _with_decoding(nets: Nets) -> Any:
    assert nets.decoding is not None
    return nets.config.temporal.model_copy(update={"decoding": nets.decoding.settings})


def test_again_gives_the_same_bytes_and_another_model_is_not_replaced(tmp_path: Path) -> None:
    nets, path = nets_of(LINEAR), tmp_path / "net.onnx"
    first = export_model(nets, path, StopRequest())
    written, stamp = path.read_bytes(), path.stat().st_mtime_ns
    again = export_model(nets, path, StopRequest())
    assert (again.unchanged, path.stat().st_mtime_ns, again.result) == (True, stamp, first.result)
    another = replace(nets, weights={"temporal": "9" * 64})
    with pytest.raises(UserError, match=r"net\.onnx: exists and is not this model"):
        export_model(another, path, StopRequest())
    assert path.read_bytes() == written
    path.write_bytes(written[:-1])  # damaged
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="--force"):
        export_model(nets, path, StopRequest())
    path.unlink()
    with pytest.raises(UserError, match=r"net\.json: exists and is not this model"):
        export_model(nets, path, StopRequest())
    assert not export_model(nets, path, StopRequest(), replace=True).unchanged
    assert path.read_bytes() == written
    path.unlink()  # as if killed between the two files
    assert not export_model(nets, path, StopRequest()).unchanged
    assert export_model(nets, path, StopRequest()).unchanged


class FromFirstFrame(Head):
    """A head whose state does not start from zeros: the first embedding is subtracted from all."""

    def __init__(self, config: head_settings.HeadSettings, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.fc, self.hidden_dim = nn.Linear(embedding_dim, phases), embedding_dim

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        first = state[0] if state else x[:, 0]
        return HeadOutput([self.fc(x - first[:, None])], x, (first,))


class Sorted(FromFirstFrame):
    """A head with an operation that ONNX does not have."""

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        return HeadOutput([self.fc(torch.cumprod(x, 2).logcumsumexp(2))], x, ())


class Growing(FromFirstFrame):
    """A head that remembers all embeddings."""

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        seen = torch.cat([*(state or ()), x], dim=1)
        return HeadOutput([self.fc(seen[:, -x.shape[1] :])], x, (seen,))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (FromFirstFrame, "other probabilities than torch"),
        (Sorted, "cannot convert this net"),
        (Growing, "the state of linear grows from frame to frame"),
    ],
)
def test_a_model_that_does_not_agree_is_not_written(head: Any, message: str, tmp_path: Path) -> None:
    nets = nets_of(head(LINEAR, D, 7))
    with pytest.raises(UserError, match=message) as refused:
        export_model(nets, tmp_path / "there" / "net.onnx", StopRequest())
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets, path = nets_of(LINEAR), tmp_path / "net.onnx"
    with pytest.raises(UserError, match="mode=offline needs whole videos"):
        export_model(decoded(nets, mode="offline"), path, StopRequest())
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        export_model(nets, tmp_path / "net.pt", StopRequest())
    with pytest.raises(UserError, match=r"openvino: only torch's nets"):
        export_model(replace(nets, parts=None), path, StopRequest())
    stop = StopRequest()
    stop.number = 15
    with pytest.raises(Stopped):
        export_model(nets, path, stop)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime cannot be imported .*; run `pip install -e '\.\[onnx\]'`"):
        export_model(nets, path, StopRequest())
    assert list(tmp_path.iterdir()) == []
