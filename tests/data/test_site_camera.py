# SPDX-License-Identifier: Apache-2.0
"""Another camera for each site, independent of the order of the stream."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from mgipt_monai.data import SiteCamerad

IMAGE = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))


def eye(name: str, site: str) -> dict:
    return {"image": IMAGE, "label": torch.ones(1, 24, 24), "name": name, "site": site}


def test_no_severity_changes_nothing() -> None:
    assert SiteCamerad("image", severity=0)(eye("a", "north"))["image"] is IMAGE


def test_a_site_has_one_camera_and_sites_by_seed_another() -> None:
    # apart from noise, two photographs of a site differ less than those of two sites with different cameras
    camera = SiteCamerad("image")
    shown = {name: camera(eye(name, "north"))["image"] for name in ("a", "b")}
    assert not torch.equal(shown["a"], shown["b"])
    by_seed = [SiteCamerad("image", seed=seed)(eye("a", "north"))["image"].mean() for seed in range(3)]
    within = (shown["a"].mean() - shown["b"].mean()).abs()
    assert min((one - other).abs() for one in by_seed for other in by_seed if one is not other) > within


def test_same_image_is_shown_alike_and_the_mask_stays() -> None:
    first = [SiteCamerad("image", severity=0.5)(eye(name, "n")) for name in ("a", "b")]
    second = [SiteCamerad("image", severity=0.5)(eye(name, "n")) for name in ("b", "a")]
    assert torch.equal(first[0]["image"], second[1]["image"])
    assert torch.equal(first[0]["label"], torch.ones(1, 24, 24))


def test_stronger_is_further_away_and_meta_data_stay() -> None:
    data = eye("a", "north")
    data["image"] = MetaTensor(IMAGE, meta={"filename_or_obj": "a.png"})
    weak, strong = (SiteCamerad("image", severity=s)(data)["image"] for s in (0.2, 1.0))
    assert (strong - IMAGE).abs().mean() > 2 * (weak - IMAGE).abs().mean()
    assert strong.meta["filename_or_obj"] == "a.png"
    assert strong.min() >= 0
    assert strong.max() <= 1


def test_wrong_severity_fails_with_the_value() -> None:
    with pytest.raises(ValueError, match=r"severity is 1\.5"):
        SiteCamerad("image", severity=1.5)
