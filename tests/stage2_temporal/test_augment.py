"""Changes of training sequences: what they do to rows and features, and that they depend on seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import SequenceAugmentConfig, SequenceConfig, TemporalConfig
from stage2_temporal.augment import FeatureNoise, resampled
from stage2_temporal.data import Span, epoch_batches
from stage2_temporal.heads.standardise import Standardise

ALL = SequenceAugmentConfig(speed=(0.5, 2.0), start=0.5)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    mode=st.sampled_from(["full", "chunked", "clips"]),
    epoch=st.integers(0, 1000),
    ranks=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_sequences_run_forwards_through_one_video_each(lengths: list[int], mode: str, epoch: int, ranks: int) -> None:
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    spans = [Span(*pair) for pair in zip(firsts, lengths, strict=True)]
    changed = resampled(spans, ALL, 3, epoch)
    assert changed == resampled(spans, ALL, 3, epoch)
    for before, after in zip(spans, changed, strict=True):
        assert 0 <= after.first - before.first <= before.frames / 2
        assert 0.5 <= after.speed <= 2.0
        last, end = after.first + int((after.frames - 1) * after.speed), before.first + before.frames
        assert last < end < last + 2 + after.speed
    sequence = SequenceConfig.model_validate({"mode": mode, "frames": 9, "stride": 4, "batch": 3})
    batches = epoch_batches(changed, sequence, 3, epoch)
    for one in [part for batch in batches for part in (batch, *(batch.share(rank, ranks)[0] for rank in range(ranks)))]:
        for row in one.rows.tolist():
            real = [value for value in row if value >= 0]
            video = sum(real[0] >= first for first in firsts) - 1
            assert real[-1] < firsts[video] + lengths[video]
            assert all(0 <= step <= 2 for step in np.diff(real))
    if mode == "full":
        found = sorted(tuple(value for value in row if value >= 0) for one in batches for row in one.rows.tolist())
        assert found == sorted(tuple(s.first + int(k * s.speed) for k in range(s.frames)) for s in changed)


def test_speeds_and_starts_are_drawn_as_stated() -> None:
    spans = [Span(100 * n, 100) for n in range(400)]
    assert resampled(spans, SequenceAugmentConfig(), 0, 0) == spans
    changed = resampled(spans, ALL, 0, 0)
    speeds, skipped = np.array([s.speed for s in changed]), np.array([s.first % 100 for s in changed])
    assert abs(np.log(speeds).mean()) < 0.05
    assert (speeds.min() < 0.52, speeds.max() > 1.9) == (True, True)
    assert 0.4 < (skipped > 0).mean() < 0.6
    assert 45 <= skipped.max() < 50
    assert changed != resampled(spans, ALL, 0, 1)


def test_features_are_left_out_and_noise_added_after_standardisation() -> None:
    standardise = Standardise(torch.tensor([5.0, -3.0, 0.0, 2.0] * 100), torch.tensor([2.0, 0.1, 1.0, 7.0] * 100))
    x = torch.randn(2, 50, 400, generator=torch.Generator().manual_seed(0)).half()
    before = standardise(x)
    assert FeatureNoise(SequenceAugmentConfig(), standardise, 0)(x, 0, [0, 1]) is x
    dropping = FeatureNoise(SequenceAugmentConfig(feature_dropout=0.25), standardise, 0)
    after = standardise(dropping(x, 1, [7, 9]))
    kept = after.abs().amax(dim=1) > 1e-3  # (2, 400)
    assert 0.65 < float(kept.float().mean()) < 0.85
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(after, before * kept[:, None] / 0.75, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dropping(x[1:, :20], 1, [9]), dropping(x, 1, [7, 9])[1:, :20])  # other chunk, other rank
    assert not torch.equal(dropping(x, 2, [7, 9]), dropping(x, 1, [7, 9]))
    noise = standardise(FeatureNoise(SequenceAugmentConfig(feature_noise=0.3), standardise, 0)(x, 0, [0, 1])) - before
    assert torch.allclose(noise.std(dim=(0, 1)), torch.tensor(0.3), atol=0.12)
    assert abs(float(noise.mean())) < 0.01


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 0.0, 1e-320, 1e9])
def test_impossible_seconds_around_transitions_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="transition_seconds"):
        TemporalConfig(transition_seconds=(2.0, seconds))


@pytest.mark.parametrize("speed", [(2.0, 0.5), (0.0, 1.0), (float("nan"), 1.0), (1.0, 1e9)])
def test_speeds_out_of_range_are_refused(speed: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"two speeds from 0\.1 to 10, the lower one first"):
        SequenceAugmentConfig(speed=speed)


def test_settings_without_changes_are_written_as_before() -> None:
    written = TemporalConfig().model_dump(mode="json")
    assert not {"augment", "smoothing_weight", "transition_weight", "transition_seconds", "ema_decay"} & set(written)
