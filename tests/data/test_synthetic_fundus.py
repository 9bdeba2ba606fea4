# SPDX-License-Identifier: Apache-2.0
"""The synthetic eyes, the cameras that photograph them and the demo stream on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgipt_monai.data.demo.cameras import CAMERAS, Camera
from mgipt_monai.data.demo.fundus import fundus_scene
from mgipt_monai.data.demo.stream import main, write_demo_site, write_demo_stream

UNSEEN = [camera for name, camera in CAMERAS.items() if name != "source"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_the_same_seed_draws_the_same_eye_to_the_last_bit() -> None:
    first, second = fundus_scene(3, 64), fundus_scene(3, 64)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_drawing_an_eye_leaves_numpys_global_random_state_alone() -> None:
    before = np.random.get_state()[1].copy()
    CAMERAS["cold_noisy"].jittered(0)(fundus_scene(0, 64)[0], 0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_different_seeds_draw_different_eyes() -> None:
    (image_a, mask_a), (image_b, mask_b) = fundus_scene(0, 64), fundus_scene(1, 64)
    assert np.abs(image_a - image_b).mean() > 0.02
    assert not np.array_equal(mask_a, mask_b)


@pytest.mark.parametrize("size", [64, 100, 128, 512])
def test_image_and_mask_have_the_promised_shapes_types_and_values(size: int) -> None:
    image, mask = fundus_scene(11, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert mask.shape == (size, size)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2}


def test_one_seed_is_the_same_eye_at_every_size() -> None:
    small, small_mask = fundus_scene(5, 64)
    large, large_mask = fundus_scene(5, 256)
    averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(averaged - small).mean() < 0.01
    for level in (1, 2):
        assert (large_mask >= level).mean() == pytest.approx((small_mask >= level).mean(), rel=0.05)


@pytest.mark.parametrize("seed", range(40))
def test_the_cup_lies_inside_a_disc_of_believable_size(seed: int) -> None:
    image, mask = fundus_scene(seed, 96)
    disc, cup = mask >= 1, mask == 2
    around_cup = np.zeros_like(cup)
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        around_cup |= np.roll(cup, shift, axis)
    assert disc[around_cup].all(), "a rim must remain between the cup and the background"
    assert 0.13 < np.sqrt(disc.mean() / np.pi) < 0.25
    assert 0.25 < np.sqrt(cup.sum() / disc.sum()) < 0.85
    assert not (disc[0].any())
    assert not (disc[-1].any())
    assert not (disc[:, 0].any())
    assert not (disc[:, -1].any())
    assert image[mask == 1, 1].mean() > image[mask == 0, 1].mean(), "the disc must be brighter in green"


@pytest.mark.parametrize(("seed", "size", "word"), [(-1, 64, "seed"), (0, 8, "size")])
def test_a_scene_that_cannot_be_drawn_is_refused_by_name(seed: int, size: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        fundus_scene(seed, size)


@pytest.mark.parametrize("camera", CAMERAS.values(), ids=lambda c: c.name)
def test_severity_zero_changes_nothing_and_severity_one_is_the_camera(camera: Camera) -> None:
    image = fundus_scene(0, 64)[0]
    assert np.array_equal(camera.scaled(0.0)(image, seed=1), image)
    assert camera.scaled(1.0) == camera


def test_severity_in_between_moves_factors_geometrically_and_the_rest_linearly() -> None:
    camera = Camera("c", (0.25, 1.0, 4.0), gamma=4.0, contrast=0.25, offset=0.2, vignetting=0.4, blur=0.02, noise=0.1)
    half = camera.scaled(0.5)
    assert half.gain == pytest.approx((0.5, 1.0, 2.0))
    assert half.gamma == pytest.approx(2.0)
    assert half.contrast == pytest.approx(0.5)
    assert (half.offset, half.vignetting, half.blur, half.noise) == pytest.approx((0.1, 0.2, 0.01, 0.05))


@pytest.mark.parametrize("severity", [-0.1, 1.5, float("nan")])
def test_a_severity_outside_zero_to_one_is_refused(severity: float) -> None:
    with pytest.raises(ValueError, match="severity"):
        CAMERAS["source"].scaled(severity)


def test_each_camera_gives_its_own_look_in_range_and_reproducibly() -> None:
    image = fundus_scene(2, 64)[0]
    looks = {name: camera(image, seed=4) for name, camera in CAMERAS.items()}
    for name, camera in CAMERAS.items():
        assert camera.name == name
        assert looks[name].dtype == np.float32
        assert looks[name].min() >= 0
        assert looks[name].max() <= 1
        assert np.array_equal(looks[name], camera(image, seed=4))
        assert not np.array_equal(looks[name], camera(image, seed=5))
    assert np.abs(looks["source"] - image).mean() < 0.04, "the source camera is mild"
    for camera in UNSEEN:
        assert np.abs(looks[camera.name] - looks["source"]).mean() > 0.05


@pytest.mark.parametrize("camera", CAMERAS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(40, 56, 1), (40, 56, 3), (33, 20, 5)])
def test_images_of_any_shape_and_channel_number_are_photographed(camera: Camera, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape)
    assert camera(image, seed=0).shape == shape


def test_one_channel_takes_the_mean_gain_and_more_channels_take_the_gains_in_turn() -> None:
    camera = Camera("c", gain=(0.3, 0.6, 0.9))
    assert camera(np.ones((2, 2, 1)), 0).ravel() == pytest.approx(0.6)
    assert camera(np.ones((1, 1, 4)), 0).ravel() == pytest.approx([0.3, 0.6, 0.9, 0.3])


def test_blur_keeps_a_flat_image_flat_up_to_its_border_and_smooths_an_edge() -> None:
    camera = Camera("c", blur=0.05)
    assert camera(np.full((32, 48, 3), 0.5), 0) == pytest.approx(0.5, abs=1e-5)
    edge = np.repeat(np.repeat((np.arange(32) > 15)[None, :, None], 32, 0), 3, 2).astype(np.float32)
    assert 0.2 < camera(edge, 0)[16, 15, 0] < 0.5


def test_jitter_varies_every_set_number_a_little_and_leaves_zeros_alone() -> None:
    camera = Camera("c", (0.9, 1.0, 1.1), gamma=0.8, contrast=0.7, offset=0.1, vignetting=0.2, blur=0.01, noise=0.02)
    varied = camera.jittered(8)
    assert varied == camera.jittered(8)
    assert varied != camera.jittered(9)
    assert varied.name == camera.name
    for key, value in asdict(camera).items():
        if key != "name":
            assert getattr(varied, key) != value
            assert np.asarray(getattr(varied, key)) == pytest.approx(np.asarray(value), rel=0.4)
    plain = Camera("plain").jittered(0)
    assert (plain.offset, plain.vignetting, plain.blur, plain.noise) == (0, 0, 0, 0)


def test_jitter_never_leaves_the_allowed_settings() -> None:
    extreme = Camera("c", gamma=10.0, contrast=10.0, offset=1.0, vignetting=1.0, blur=0.1, noise=1.0)
    assert all(extreme.jittered(seed) for seed in range(20))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("gain", (1.0, 1.0)),
        ("gain", (1.0, 0.0, 1.0)),
        ("gain", (1.0, float("nan"), 1.0)),
        ("gamma", 0.0),
        ("gamma", float("nan")),
        ("contrast", -1.0),
        ("offset", 2.0),
        ("vignetting", 1.5),
        ("blur", -0.1),
        ("blur", 3.0),
        ("noise", -0.01),
    ],
)
def test_a_bad_camera_setting_is_refused_by_name_and_value(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting) as caught:
        Camera(**{"name": "c", setting: value})
    assert str(value) in str(caught.value)
    assert "give" in str(caught.value)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8)], ids=["two_axes", "integers"])
def test_an_image_a_camera_cannot_read_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="floats in"):
        CAMERAS["source"](image, 0)


def test_a_written_stream_has_the_promised_layout_and_datalist(tmp_path: Path) -> None:
    cameras = [CAMERAS["source"], CAMERAS["cold_noisy"]]
    items = write_demo_stream(tmp_path, cameras, count=2, seed=3, size=64)
    assert [item["site"] for item in items] == ["source", "source", "cold_noisy", "cold_noisy"]
    assert set(_files(tmp_path)) == {
        f"{camera.name}/{kind}/eye_{index:03d}.png"
        for camera in cameras
        for kind in ("images", "masks")
        for index in (0, 1)
    }
    for item in items:
        image, mask = Image.open(item["image"]), Image.open(item["label"])
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (64, 64), "L", (64, 64))
        assert set(np.unique(np.asarray(mask))) == {0, 1, 2}
        assert Path(item["image"]).relative_to(tmp_path).parts[0] == item["site"]


def test_a_second_write_is_identical_to_the_byte_from_python_and_the_command_line(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_demo_stream(tmp_path / folder, list(CAMERAS.values()), count=1, seed=1, size=64)
    main(["--folder", str(tmp_path / "c"), "--count", "1", "--seed", "1", "--size", "64"])
    assert _files(tmp_path / "a") == _files(tmp_path / "b") == _files(tmp_path / "c")


def test_the_first_demo_eye_is_the_same_in_every_process(tmp_path: Path) -> None:
    # recorded numbers: seeding by hash() would change them whenever python restarts
    mask = np.asarray(Image.open(write_demo_site(tmp_path, CAMERAS["source"], 1, 0, 64)[0]["label"]))
    assert ((mask >= 1).sum(), (mask == 2).sum()) == (pytest.approx(348, abs=3), pytest.approx(139, abs=3))


def test_cameras_indices_and_seeds_all_lead_to_different_eyes(tmp_path: Path) -> None:
    sites = [write_demo_site(tmp_path / str(seed), c, 2, seed, 64) for seed in (0, 1) for c in CAMERAS.values()]
    masks = {Path(item["label"]).read_bytes() for site in sites for item in site}
    assert len(masks) == 2 * 2 * len(CAMERAS)


def test_severity_keeps_the_eyes_of_a_site(tmp_path: Path) -> None:
    camera = CAMERAS["warm_vignetted"]
    mild = write_demo_site(tmp_path / "mild", camera.scaled(0.3), 1, 0, 64)[0]
    full = write_demo_site(tmp_path / "full", camera, 1, 0, 64)[0]
    assert Path(mild["label"]).read_bytes() == Path(full["label"]).read_bytes()
    assert Path(mild["image"]).read_bytes() != Path(full["image"]).read_bytes()


def test_a_stream_that_would_overwrite_itself_or_be_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own name"):
        write_demo_stream(tmp_path, [CAMERAS["source"], CAMERAS["source"]], count=1)
    with pytest.raises(ValueError, match="count is 0"):
        write_demo_site(tmp_path, CAMERAS["source"], count=0, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        write_demo_site(tmp_path, CAMERAS["source"], count=1, seed=-1)


def test_the_command_line_names_the_cameras_to_choose_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path), "--cameras", "source,polaroid"])
    message = capsys.readouterr().err
    assert "'polaroid'" in message
    assert "low_contrast" in message
