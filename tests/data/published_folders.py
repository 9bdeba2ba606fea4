# SPDX-License-Identifier: Apache-2.0
"""Miniature folders of published datasets, as distributed by their owners."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 48


@dataclass
class Case:
    """The expected result for one image of a folder."""

    site: str
    name: str
    image: np.ndarray
    mask: np.ndarray
    split: str = ""


def photograph(seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, width, 3), dtype=np.uint8)


def eye(row: int = 8, column: int = 16, width: int = WIDTH) -> np.ndarray:
    """Return a disc of 16 x 16 with a cup of 8 x 8, aligned with the blocks of JPEG."""
    mask = np.zeros((HEIGHT, width), dtype=np.uint8)
    mask[row : row + 16, column : column + 16] = 1
    mask[row : row + 8, column : column + 8] = 2
    return mask


def save(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write an image and return it as read from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(
        path, **({"quality": 95, "subsampling": 0} if path.suffix in (".jpg", ".jpeg") else {})
    )
    return np.asarray(Image.open(path))


def black_and_white(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def grey(mask: np.ndarray) -> np.ndarray:
    return np.array([255, 128, 0], dtype=np.uint8)[mask]


def rim_one_dl(root: Path) -> list[Case]:
    cases = []
    stems = {"r1_Im001": "normal", "r2_Im300": "glaucoma", "r3_G-1-L_left_half": "glaucoma"}
    for seed, (stem, kind) in enumerate(stems.items()):
        mask = eye(column=8 * seed)
        for partition in ("partitioned_by_hospital/test_set", "partitioned_randomly/training_set"):
            image = save(root / "RIM-ONE_DL_images" / partition / kind / f"{stem}.png", photograph(seed))
        masks = root / "RIM-ONE_DL_reference_segmentations" / kind
        save(masks / f"{stem}-1-Disc-T.png", black_and_white(mask > 0))
        save(masks / f"{stem}-1-Cup-T.png", black_and_white(mask > 1))
        (masks / f"{stem}-1-Cup-T.txt").write_text("outline")
        cases.append(Case(f"rimone_{stem[:2]}", stem, image, mask))
    return cases


def rim_one_r3(root: Path) -> list[Case]:
    cases = []
    for seed, (kind, stem) in enumerate((("Healthy", "N-1-L"), ("Glaucoma and suspects", "S-2-R"))):
        image = save(root / kind / "Stereo Images" / f"{stem}.jpg", photograph(seed, 2 * WIDTH))
        mask = eye(width=2 * WIDTH)
        for structure, inside in (("Disc", mask > 0), ("Cup", mask > 1)):
            save(root / kind / "Average_masks" / f"{stem}-{structure}-Avg.png", black_and_white(inside))
            save(root / kind / "Expert1_masks" / f"{stem}-1-{structure}-exp1.png", black_and_white(mask < 0))
        cases.append(Case("rimone_r3", stem, image[:, :WIDTH], mask[:, :WIDTH]))
    return cases


def refuge(root: Path) -> list[Case]:
    cases = []
    files = {
        "g0001": ("REFUGE-Training400/Training400/Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Glaucoma"),
        "n0002": ("REFUGE-Training400/Training400/Non-Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma"),
        "V0001": ("REFUGE-Validation400", "REFUGE-Validation400-GT/Disc_Cup_Masks"),
        "T0001": ("Test400", "REFUGE-Test-GT/Disc_Cup_Masks/G"),
    }
    for seed, (stem, (images, masks)) in enumerate(files.items()):
        image = save(root / images / f"{stem}.jpg", photograph(seed))
        save(root / masks / f"{stem}.bmp", grey(eye(column=seed)))
        split = {"V": "valid", "T": "test"}.get(stem[0], "")
        cases.append(Case("refuge_valid_test" if split else "refuge", stem, image, eye(column=seed), split))
    return cases


def origa(root: Path) -> list[Case]:
    cases = []
    for seed, stem in enumerate(("001", "650")):
        image = save(root / "Images" / f"{stem}.jpg", photograph(seed))
        save(root / "Images_Square" / f"{stem}.jpg", photograph(9))
        save(root / "Masks" / f"{stem}.png", eye(row=seed))
        cases.append(Case("origa", stem, image, eye(row=seed)))
    return cases


def drishti_gs(root: Path) -> list[Case]:
    cases = []
    for seed, (part, truth, split) in enumerate((("Training", "GT", "train"), ("Test", "Test_GT", "test"))):
        stem = f"drishtiGS_{seed:03d}"
        image = save(root / part / "Images" / f"{stem}.png", photograph(seed))
        mask = eye(column=seed)
        # one expert of four outside the expected outline, two to four inside
        votes = np.random.default_rng(seed).choice([128, 191, 255], mask.shape)
        for name, inside in (("ODsegSoftmap", mask > 0), ("cupsegSoftmap", mask > 1)):
            soft = np.where(inside, votes, 64).astype(np.uint8)
            save(root / part / truth / stem / "SoftMap" / f"{stem}_{name}.png", soft)
        cases.append(Case("drishti_gs", stem, image, mask, split))
    return cases


def preprocessed(root: Path) -> list[Case]:
    cases = []
    listed = ("RIM_ONE_r3_train", "b"), ("RIM_ONE_r3_train", "a"), ("RIM_ONE_r3_test", "c"), ("REFUGE_Valid", "V1")
    for seed, (table, stem) in enumerate(listed):
        image = save(root / "pixels" / f"{stem}.png", photograph(seed))
        mask = eye(column=seed)
        coded = grey(mask)
        coded[mask == 1] = 1 + np.arange(np.sum(mask == 1)) % 254  # anything in between is the rim
        save(root / "pixels" / f"{stem}.tif", coded)
        with (root / f"{table}.csv").open("a") as file:
            file.write("image,mask\n" * (file.tell() == 0) + f"pixels/{stem}.png,pixels/{stem}.tif\n")
        site, split = (table, "") if stem == "V1" else ("RIM_ONE_r3", table.removeprefix("RIM_ONE_r3_"))
        cases.append(Case(site, stem, image, mask, split))
    return cases


def bkai(root: Path) -> list[Case]:
    red_and_green = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    red_and_green[8:16, :8, 0] = 255
    red_and_green[16:32, 16:24, 1] = 255
    image = save(root / "train" / "train" / "0f.jpeg", photograph(0))
    save(root / "train_gt" / "train_gt" / "0f.jpeg", red_and_green)
    save(root / "test" / "test" / "1f.jpeg", photograph(1))
    return [Case("bkai", "0f", image, (red_and_green.max(axis=2) > 0).astype(np.uint8))]


def polyps(root: Path, site: str, images: str, masks: str) -> list[Case]:
    """Write one frame; both paths are relative and include the file names."""
    image = save(root / images, photograph(0))
    save(root / masks, black_and_white(eye() > 0))
    return [Case(site, Path(images).stem, image, (eye() > 0).astype(np.uint8))]


BUILD = {
    "rim_one_dl": rim_one_dl,
    "rim_one_r3": rim_one_r3,
    "refuge": refuge,
    "origa": origa,
    "drishti_gs": drishti_gs,
    "preprocessed": preprocessed,
    "bkai": bkai,
    "cvc_clinicdb": lambda root: polyps(root, "cvc_clinicdb", "Original/7.tif", "Ground Truth/7.tif"),
    "etis_larib": lambda root: polyps(root, "etis_larib", "ETIS-LaribPolypDB/7.tif", "Ground Truth/p7.tif"),
    "kvasir_seg": lambda root: polyps(root, "kvasir_seg", "Kvasir-SEG/images/cj.jpg", "Kvasir-SEG/masks/cj.jpg"),
}
