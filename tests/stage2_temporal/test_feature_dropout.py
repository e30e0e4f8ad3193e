"""Dropout of features in training: what it does to them, and that it depends on seed, epoch and sequence alone."""

from __future__ import annotations

import torch

from configs.schema import TemporalConfig
from stage2_temporal.feature_dropout import FeatureDropout
from stage2_temporal.heads.standardise import Standardise


def test_features_are_left_out_after_standardisation() -> None:
    standardise = Standardise(torch.tensor([5.0, -3.0, 0.0, 2.0] * 100), torch.tensor([2.0, 0.1, 1.0, 7.0] * 100))
    x = torch.randn(2, 50, 400, generator=torch.Generator().manual_seed(0)).half()
    before = standardise(x)
    assert FeatureDropout(0.0, standardise, 0)(x, 0, [0, 1]) is x
    dropping = FeatureDropout(0.25, standardise, 0)
    after = standardise(dropping(x, 1, [7, 9]))
    kept = after.abs().amax(dim=1) > 1e-3  # (2, 400)
    assert 0.65 < float(kept.float().mean()) < 0.85
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(after, before * kept[:, None] / 0.75, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dropping(x[1:, :20], 1, [9]), dropping(x, 1, [7, 9])[1:, :20])  # other chunk, other rank
    assert not torch.equal(dropping(x, 2, [7, 9]), dropping(x, 1, [7, 9]))


def test_settings_without_changes_are_written_as_before() -> None:
    written = TemporalConfig().model_dump(mode="json")
    assert not {"feature_dropout", "smoothing_weight", "ema_decay", "keep_epoch"} & set(written)
