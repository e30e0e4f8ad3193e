"""One preprocessing: its geometry, crops, random draws and normalisation, each against a restatement."""

from __future__ import annotations

import colorsys
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.schema import AugmentConfig, PreprocessConfig
from features.frames.preprocess import (
    Geometry,
    augment,
    augment_generator,
    changed_images,
    crop_frames,
    different_geometries,
    draw_change,
    find_margin,
    geometry_json,
    normalise,
    preprocess_json,
    resize_each,
    split_sizes,
)
from features.video.images import FolderReader
from features.video.open import open_video

rng = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, size=shape, dtype=np.uint8)


def endoscope(width: int = 160, height: int = 90, radius: int = 50, level: int = 120) -> np.ndarray:
    """A round bright field on black with a little noise, as an endoscope gives."""
    y, x = np.mgrid[:height, :width]
    field = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
    frame = np.where(field[..., None], level, 0) + rng.integers(0, 12, size=(height, width, 3))
    return frame.astype(np.uint8)


# ------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("shape", [(480, 854, 3), (90, 47, 3), (250, 250, 3), (16, 16, 3)])
def test_resize_is_pillows_bilinear(shape):
    frame = noise(*shape)
    got = Geometry(50).resize_frame(frame)
    assert np.array_equal(got, np.asarray(Image.fromarray(frame).resize((50, 50), Image.Resampling.BILINEAR)))
    assert got.dtype == np.uint8
    assert got.flags.writeable


def test_resize_is_antialiased_and_close_to_exact_arithmetic():
    """Halving is a triangle filter with weights 1/8, 3/8, 3/8, 1/8 per axis; in floats it differs by rounding only."""
    frame = noise(64, 64, 3)
    kernel = np.array([1, 3, 3, 1]) / 8

    def halve(x: np.ndarray) -> np.ndarray:
        return sum(weight * x[start : start + 60 : 2] for start, weight in enumerate(kernel, start=1))

    want = halve(halve(frame.astype(float)).swapaxes(0, 1)).swapaxes(0, 1)
    got = Geometry(32).resize_frame(frame)[1:31, 1:31]
    assert np.abs(got - want).max() <= 1.0


def test_box_is_cut_before_the_resize_and_nothing_outside_leaks_in():
    frame = np.full((60, 100, 3), 255, np.uint8)
    frame[10:50, 20:80] = noise(40, 60, 3) // 4
    got = Geometry(30, box=(20, 10, 80, 50)).resize_frame(frame)
    assert np.array_equal(got, Geometry(30).resize_frame(frame[10:50, 20:80]))
    assert got.max() < 64


def test_box_beyond_a_smaller_frame_is_cut_to_it():
    frame = noise(40, 50, 3)
    assert np.array_equal(
        Geometry(30, box=(10, 5, 200, 100)).resize_frame(frame), Geometry(30).resize_frame(frame[5:, 10:])
    )
    assert np.array_equal(Geometry(30, box=(60, 60, 90, 90)).resize_frame(frame), Geometry(30).resize_frame(frame))


# ------------------------------------------------------------------------------------------ margin


def test_margin_is_the_bright_fields_box():
    left, top, right, bottom = find_margin([endoscope()] * 3)
    assert (top, bottom) == (0, 90)
    assert abs(left - 30) <= 2
    assert abs(right - 130) <= 2


def test_dark_and_wide_frames_do_not_move_the_box():
    box = find_margin([endoscope()] * 6)
    dark = [np.zeros((90, 160, 3), np.uint8), endoscope(level=15), endoscope(radius=8)]
    wide = [np.full((90, 160, 3), 200, np.uint8)]
    half_lit = [endoscope(radius=40)]
    assert find_margin([*dark, endoscope(), endoscope(), *wide, endoscope(), endoscope(), *half_lit]) == box


def test_no_margin_is_none():
    assert find_margin([np.full((90, 160, 3), 99, np.uint8)]) is None
    assert find_margin([np.zeros((90, 160, 3), np.uint8)] * 4) is None
    assert find_margin([]) is None


def test_a_burned_in_line_of_text_is_not_the_field():
    frame = endoscope()
    frame[40:42, 2:20] = 255
    assert find_margin([frame]) == find_margin([endoscope()])


def test_geometry_of_a_video_reads_frames_only_where_needed(tmp_path):
    files = []
    for number in range(0, 2000, 100):
        Image.fromarray(endoscope()).save(tmp_path / f"{number}.png")
        files.append((number, f"{number}.png"))
    reader = FolderReader(tmp_path, dict(files))
    cut, whole = (PreprocessConfig(cut_margin=choice, resize_px=64, crop_px=48) for choice in (True, False))
    alone = Geometry.of_video(cut, reader)
    assert alone.box is not None
    assert Geometry.each_of_video([whole, cut, cut], reader) == [Geometry(64), alone, alone]
    for path in tmp_path.iterdir():
        path.unlink()
    assert Geometry.of_video(whole, reader) == Geometry(64)


def test_margin_of_real_clips(shared_data):
    path = shared_data / "clips" / "videos" / "video47.mp4"
    with open_video(path, "pyav") as reader:
        geometry = Geometry.of_video(PreprocessConfig(cut_margin=True), reader)
    left, top, right, bottom = geometry.box
    assert abs(left - 135) <= 3
    assert abs(right - 736) <= 3
    assert top <= 2
    assert bottom >= 477


# ------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize(("resized", "crop"), [(25, 22), (24, 17), (20, 20)])
def test_crops_are_torchvisions(resized, crop):
    from torchvision.transforms.functional import five_crop, ten_crop

    frames = noise(3, resized, resized, 3)
    images = torch.as_tensor(frames).permute(0, 3, 1, 2)
    # torchvision rounds the centre's offset to even, this project down; if they may differ, the centre is not compared.
    for count, reference in ((5, five_crop), (10, ten_crop)):
        got = crop_frames(frames, crop, count)
        assert got.shape == (3, count, crop, crop, 3)
        assert np.array_equal(crop_frames(torch.as_tensor(frames), crop, count), got)
        want = reference(images, [crop, crop])
        for number, image in enumerate(want):
            if number % 5 == 4 and (resized - crop) % 2:
                continue
            assert np.array_equal(got[:, number], image.permute(0, 2, 3, 1).numpy())


rectangles = st.tuples(st.integers(16, 40), st.integers(16, 40))


@settings(deadline=None, max_examples=40)
@given(rectangles, rectangles, st.integers(0, 1000))
def test_crops_of_rectangles_are_torchvisions(crop, margin, seed):
    """Height and width are never exchanged, in evaluation or in training."""
    from torchvision.transforms.functional import ten_crop

    size = (crop[0] + margin[0] - 16, crop[1] + margin[1] - 16)
    frames = noise(2, *size, 3)
    got = crop_frames(frames, crop, 10)
    assert got.shape == (2, 10, *crop, 3)
    for number, image in enumerate(ten_crop(torch.as_tensor(frames).permute(0, 3, 1, 2), list(crop))):
        if number % 5 < 4:  # the centre's offset is rounded in another way
            assert np.array_equal(got[:, number], image.permute(0, 2, 3, 1).numpy())
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    assert np.array_equal(got[:, 4], frames[:, top : top + crop[0], left : left + crop[1]])
    draw = draw_change(augment_generator(seed, 0, 0), AugmentConfig(), size, crop)
    assert 0 <= draw.top <= size[0] - crop[0]
    assert 0 <= draw.left <= size[1] - crop[1]
    assert draw.crop(frames, crop).shape == (2, *crop, 3)
    images = normalise(got[:, 0], PreprocessConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert np.array_equal(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy(), got[:, 0])


def test_every_offset_in_a_rectangle_occurs():
    drawn = [draw_change(augment_generator(0, 0, k), AugmentConfig(), (18, 21), (16, 16)) for k in range(400)]
    assert {(draw.top, draw.left) for draw in drawn} == {(top, left) for top in range(3) for left in range(6)}


def test_centre_offset_is_rounded_down():
    frames = np.arange(5 * 5, dtype=np.uint8).reshape(1, 5, 5, 1).repeat(3, axis=-1)
    assert crop_frames(frames, 2)[0, 0, :, :, 0].tolist() == [[6, 7], [11, 12]]
    assert crop_frames(noise(2, 250, 250, 3), 224).shape == (2, 1, 224, 224, 3)
    frame = noise(1, 250, 250, 3)
    for kind in (np.asarray, torch.as_tensor):
        assert np.array_equal(crop_frames(kind(frame), 224)[:, 0], frame[:, 13:237, 13:237])


def test_crop_larger_than_the_frame_is_an_error():
    with pytest.raises(ValueError, match="cannot crop 30 x 30 from 20 x 20 pixels"):
        crop_frames(noise(1, 20, 20, 3), 30)
    with pytest.raises(ValueError, match="cannot crop 30 x 30 from 20 x 20 pixels"):
        augment(noise(1, 20, 20, 3), augment_generator(0, 0, 0), AugmentConfig(), 30)


# ------------------------------------------------------------------------------------------ augmentation

JITTER = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 99), sample=st.integers(0, 10**7), jitter=st.booleans())
def test_draws_depend_on_seed_epoch_and_sample_alone(seed, epoch, sample, jitter):
    config = AugmentConfig(**(JITTER if jitter else {}))
    first = draw_change(augment_generator(seed, epoch, sample), config, 20, 16)
    augment_generator(seed, epoch, sample + 1).random(1000)
    again = draw_change(augment_generator(seed, epoch, sample), config, 20, 16)
    assert (first.top, first.left, first.flip) == (again.top, again.left, again.flip)
    assert np.array_equal(first.colour, again.colour)
    assert np.array_equal(first.colour, np.ones(3, np.float32)) != jitter


def test_a_clip_shares_one_draw():
    frame = noise(1, 20, 20, 3)
    for sample in range(20):
        clip = augment(frame.repeat(4, axis=0), augment_generator(1, 2, sample), AugmentConfig(), 16)
        assert clip.shape == (4, 16, 16, 3)
        assert all(np.array_equal(clip[0], other) for other in clip[1:])


def test_every_offset_and_both_flips_occur_and_nothing_else():
    frame = np.arange(18 * 18, dtype=np.uint16).reshape(1, 18, 18, 1) % 251
    frame = frame.astype(np.uint8).repeat(3, axis=-1)
    seen = set()
    for sample in range(400):
        got = augment(frame, augment_generator(0, 0, sample), AugmentConfig(), 16)
        seen.add(got.tobytes())
    want = {
        frame[:, top : top + 16, left : left + 16][:, :, ::step].tobytes()
        for top in range(3)
        for left in range(3)
        for step in (1, -1)
    }
    assert seen == want


def test_enabling_a_change_does_not_alter_the_other_draws():
    clip = noise(2, 20, 20, 3)
    for sample in range(10):
        plain = augment(clip, augment_generator(0, 0, sample), AugmentConfig(flip=False), 16)
        flipped = augment(clip, augment_generator(0, 0, sample), AugmentConfig(flip=True), 16)
        on_device = augment(torch.as_tensor(clip), augment_generator(0, 0, sample), AugmentConfig(flip=True), 16)
        assert np.array_equal(on_device, flipped)
        assert np.array_equal(plain, flipped) or np.array_equal(plain, flipped[:, :, ::-1])


def test_centre_without_changes_is_the_evaluation_crop():
    clip = noise(3, 21, 21, 3)
    got = augment(clip, augment_generator(0, 0, 0), AugmentConfig(crop="centre", flip=False), 16)
    assert np.array_equal(got, crop_frames(clip, 16)[:, 0])


def test_colour_change_is_as_stated():
    clip = np.concatenate([noise(2, 16, 16, 3), noise(1, 16, 16, 3) // 9])  # each frame has a mean of its own
    generator = augment_generator(3, 1, 4)
    generator.integers(0, 1, size=2)
    generator.random()
    brightness, contrast, saturation = 1 + np.array([0.3, 0.4, 0.5]) * generator.uniform(-1, 1, size=3)
    want = np.empty(clip.shape)
    for t, frame in enumerate(clip.astype(float) * brightness):
        mean = (frame @ [0.299, 0.587, 0.114]).mean()
        frame = mean + contrast * (frame - mean)
        grey = (frame @ [0.299, 0.587, 0.114])[..., None]
        want[t] = grey + saturation * (frame - grey)
    draw = draw_change(augment_generator(3, 1, 4), AugmentConfig(crop="centre", flip=False, **JITTER), 16, 16)
    colour = torch.from_numpy(draw.colour).repeat(3, 1)
    plain = PreprocessConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    got = changed_images(torch.from_numpy(clip), torch.zeros(3, dtype=torch.bool), colour, plain)
    assert np.abs(got.permute(0, 2, 3, 1).numpy() * 255 - want.clip(0, 255)).max() < 1e-3


WINDOWS = AugmentConfig(scale=(0.3, 0.9), aspect=1.5, hue=0.2, **JITTER)


def test_windows_have_the_area_and_aspect_asked_for_and_lie_anywhere():
    frame, crop = (60, 100), (32, 40)
    drawn = [draw_change(augment_generator(0, 0, k), WINDOWS, frame, crop) for k in range(300)]
    sizes = np.array([draw.window for draw in drawn])
    area, aspect = sizes.prod(axis=1) / (60 * 75), sizes[:, 0] / sizes[:, 1] / 0.8
    whole = (sizes == frame).any(axis=1)  # a side was cut to that of the frame
    assert 0.28 < area.min() < 0.35
    assert 0.75 < area.max() < 0.92
    assert np.all((aspect > 1 / 1.55) & (aspect < 1.55) | whole)
    assert (0.6 < aspect[~whole].min() < 0.75, 1.25 < aspect[~whole].max() < 1.55) == (True, True)
    corner = np.array([(draw.top, draw.left) for draw in drawn])
    rest = np.array(frame) - sizes
    assert np.all((corner >= 0) & (corner <= rest))
    place = (corner / np.maximum(rest, 1))[~whole].mean(axis=0)
    assert np.abs(place - 0.5).max() < 0.1
    for draw in drawn[:5]:  # nothing else is drawn otherwise
        plain = draw_change(augment_generator(0, 0, drawn.index(draw)), AugmentConfig(**JITTER), frame, crop)
        assert (draw.flip, *draw.colour[:3]) == (plain.flip, *plain.colour)
        assert 0 < abs(draw.colour[3]) <= 0.2


@pytest.mark.parametrize(("frame", "crop"), [((224, 398), (216, 216)), ((398, 224), (200, 216)), ((96, 96), (32, 64))])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.4, 1.0)])
def test_windows_are_not_stretched_unless_aspect_says_so(frame, crop, scale):
    config = AugmentConfig(scale=scale)
    sizes = [draw_change(augment_generator(0, 0, k), config, frame, crop).window for k in range(50)]
    for height, width in sizes:
        assert abs(height - width * crop[0] / crop[1]) <= 1.5
    largest = min(frame[0], frame[1] * crop[0] / crop[1])
    assert min(height for height, _ in sizes) >= scale[0] ** 0.5 * largest - 1
    assert max(height for height, _ in sizes) <= largest + 1


def test_a_window_is_resized_as_torchvision_does():
    from torchvision.transforms.v2.functional import resized_crop

    clip = noise(3, 40, 50, 3)
    draw = draw_change(augment_generator(0, 0, 3), WINDOWS, (40, 50), (24, 32))
    window = (draw.top, draw.left, *draw.window)
    want = resized_crop(torch.from_numpy(clip).permute(0, 3, 1, 2), *window, [24, 32], antialias=True)
    for kind in (np.asarray, torch.as_tensor):
        assert np.array_equal(draw.crop(kind(clip), (24, 32)), want.permute(0, 2, 3, 1))
    whole = draw_change(augment_generator(0, 0, 3), AugmentConfig(scale=(1.0, 1.0)), (24, 32), (24, 32))
    assert np.array_equal(whole.crop(clip[:, :24, :32], (24, 32)), clip[:, :24, :32])


def test_a_shift_of_hues_keeps_luma_and_strength_of_colours():
    plain = PreprocessConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    frame, none = torch.from_numpy(noise(1, 8, 8, 3) // 4 + 96), torch.zeros(1, dtype=torch.bool)

    def shifted(images, shift):
        got = changed_images(images, none, torch.tensor([[1.0, 1.0, 1.0, shift]]), plain)
        return got.permute(0, 2, 3, 1).numpy().reshape(-1, 3)

    before = frame.numpy().reshape(-1, 3) / 255
    after = shifted(frame, 0.2)
    yiq = [np.array([colorsys.rgb_to_yiq(*pixel) for pixel in pixels.astype(float)]) for pixels in (before, after)]
    assert np.allclose(yiq[0][:, 0], yiq[1][:, 0], atol=2e-3)
    colours = [one[:, 1] + 1j * one[:, 2] for one in yiq]
    turns = np.angle(colours[1] / colours[0]) / (2 * np.pi)
    assert np.abs(np.abs(turns) - 0.2)[np.abs(colours[0]) > 0.03].max() < 0.01
    assert np.allclose(shifted(frame, 0.0), before, atol=1e-6)
    red = torch.tensor([150, 90, 90], dtype=torch.uint8).expand(1, 8, 8, 3)
    assert shifted(red, 1 / 3)[0].argmax() == 1  # towards green, as in other programs
    assert shifted(red, -1 / 3)[0].argmax() == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"scale": (0.9, 0.5)}, "smaller one first"),
        ({"scale": (float("nan"), 1.0)}, "two fractions"),
        ({"scale": (0.5, 1.0), "crop": "centre"}, "crop=centre cannot be combined with scale"),
    ],
)
def test_windows_that_cannot_be_drawn_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        AugmentConfig(**settings)


def test_changes_of_a_batch_are_those_of_its_frames():
    """Mirrored if drawn, coloured frame by frame, and without changes exactly the numbers of evaluation."""
    batch, config = torch.from_numpy(noise(4, 16, 16, 3)), PreprocessConfig()
    flip, none = torch.tensor([True, False, True, False]), torch.zeros(0, 3)
    mirrored = changed_images(batch, flip, none, config)
    assert torch.equal(mirrored[flip], normalise(batch[flip].flip(2), config))
    assert torch.equal(mirrored[~flip], normalise(batch[~flip], config))
    colour = 1 + torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    before = batch.clone()
    together = changed_images(batch, flip, colour, config)
    alone = [changed_images(batch[n : n + 1], flip[n : n + 1], colour[n : n + 1], config) for n in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(together, mirrored, atol=0.1)
    assert torch.equal(batch, before)
    assert together.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_normalise_is_torchvisions(kind):
    from torchvision.transforms.functional import normalize

    config = PreprocessConfig()
    frames = noise(4, 20, 20, 3)
    want = normalize(torch.as_tensor(frames).permute(0, 3, 1, 2) / 255, config.mean, config.std)
    got = normalise(kind(frames), config)
    assert torch.equal(got, want)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_normalise_takes_crops_that_are_views_and_leaves_them_alone():
    frames = torch.as_tensor(noise(2, 30, 30, 3))
    before = frames.clone()
    view = frames[:, 3:23, 4:24]
    assert torch.equal(normalise(view, PreprocessConfig()), normalise(view.clone(), PreprocessConfig()))
    assert torch.equal(frames, before)
    with pytest.raises(ValueError, match="must be uint8"):
        normalise(view.float(), PreprocessConfig())


# ------------------------------------------------------------------------------------------ identity


def test_json_names_everything_that_changes_the_numbers():
    base = PreprocessConfig()
    for change in (
        {"cut_margin": True},
        {"resize_px": 256},
        {"crop_px": 200},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
    ):
        assert preprocess_json(base.model_copy(update=change)) != preprocess_json(base)
    assert "Pillow" in preprocess_json(base)["resize"]
    assert geometry_json(base) == geometry_json(PreprocessConfig(crop_px=200, mean=(0.5, 0.5, 0.5)))
    assert geometry_json(base) != geometry_json(PreprocessConfig(cut_margin=True))


def test_importing_the_module_imports_neither_torch_nor_pillow():
    script = "import sys, features.frames.preprocess; print([m for m in ('torch', 'PIL', 'av') if m in sys.modules])"
    project = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=project, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.tuples(st.integers(16, 40), st.integers(16, 40)), min_size=1, max_size=4), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_one_frame_in_several_sizes_is_what_each_size_alone_gives(sizes: list[tuple[int, int]], count: int) -> None:
    geometries = [Geometry(size, (3, 2, 60, 41) if size[0] % 2 else None, "bicubic") for size in sizes]
    frames = np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)
    batch = np.stack([resize_each(geometries, frame) for frame in frames])
    for found, geometry in zip(split_sizes(batch, sizes), geometries, strict=True):
        np.testing.assert_array_equal(found, np.stack([geometry.resize_frame(frame) for frame in frames]))


def test_settings_that_resize_alike_share_the_frames() -> None:
    first, larger = PreprocessConfig(), PreprocessConfig(resize_px=256)
    other_crop, other_filter = PreprocessConfig(crop_px=200), PreprocessConfig(interpolation="bicubic")
    found = different_geometries([first, larger, other_crop, other_filter, larger])
    assert found == ([first, larger, other_filter], [0, 1, 0, 2, 1])
    aspect = {"resize_px": 224, "short_side_px": 256}  # where the centre lies depends on the crop
    kept = [PreprocessConfig(crop_px=size, **aspect) for size in (224, 223)]
    assert different_geometries(kept) == (kept, [0, 1])
