# SPDX-License-Identifier: Apache-2.0
"""Damage to weights and statistics files is noticed: nothing loads with other numbers than were saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mgipt_monai import load_encoder_weights, load_source_weights
from mgipt_monai.networks import SourceStatistics, measure_source_statistics
from mgipt_monai.networks.alignment.source_statistics import LayerStatistics
from mgipt_monai.utils.files import save_state
from tests.bundle.conftest import CONFIGS, QUICK, demo_sites, run_bundle
from tests.conftest import identical, snapshot, tiny_network

__all__ = ["demo_sites"]

FLIPS = 400


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one random bit flipped."""
    damaged = bytearray(content)
    place = int(rng.integers(len(damaged)))
    damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def fates(path: Path, load: Callable[[], bool]) -> dict[str, int]:
    """Flip one bit at a time; count what is refused, loads unchanged (it was padding) and loads with other numbers."""
    content, rng = path.read_bytes(), np.random.default_rng(0)
    counts = {"refused": 0, "same": 0, "changed": 0}
    for _ in range(FLIPS):
        path.write_bytes(flipped(content, rng))
        try:
            counts["same" if load() else "changed"] += 1
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (each of the 400 is looked at)
            counts["refused"] += 1
    path.write_bytes(content)
    return counts


@pytest.mark.parametrize("load", [load_source_weights, load_encoder_weights])
def test_no_flipped_bit_in_weights_changes_a_number(load: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    torch.save(tiny_network(seed=4).state_dict(), tmp_path / "w.pt")
    wanted = snapshot(tiny_network(seed=4))

    def loads() -> bool:
        network = tiny_network(seed=5)
        load(network, tmp_path / "w.pt")
        return identical(snapshot(network), wanted)

    counts = fates(tmp_path / "w.pt", loads)
    assert counts["changed"] == 0, counts
    assert counts["refused"] > 0


def test_no_flipped_bit_in_weights_with_a_fingerprint_loads_at_all(tmp_path: Path) -> None:
    torch.save(tiny_network(seed=4).state_dict(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    (tmp_path / "w.pt.sha256").write_text(f"{digest}  w.pt\n")

    def loads() -> bool:
        load_source_weights(tiny_network(), tmp_path / "w.pt")
        return True

    assert fates(tmp_path / "w.pt", loads) == {"refused": FLIPS, "same": 0, "changed": 0}


def test_no_statistics_file_with_a_flipped_bit_loads_at_all(tmp_path: Path) -> None:
    network = tiny_network()
    measured = measure_source_statistics(network, [torch.rand(1, 3, 16, 16)])
    measured.save(tmp_path / "s.pt")

    def loads() -> bool:
        found = SourceStatistics.load(tmp_path / "s.pt")
        same = (found.images, found.fingerprint, list(found.layers)) == (
            measured.images, measured.fingerprint, list(measured.layers)
        )  # fmt: skip
        return same and all(
            torch.equal(found.layers[name].mean, layer.mean) and torch.equal(found.layers[name].std, layer.std)
            for name, layer in measured.layers.items()
        )

    assert loads()
    assert fates(tmp_path / "s.pt", loads) == {"refused": FLIPS, "same": 0, "changed": 0}


def test_log_says_whether_weights_were_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(tiny_network().state_dict(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    with caplog.at_level("INFO", logger="mgipt_monai"):
        load_source_weights(tiny_network(), tmp_path / "w.pt")
        assert f"SHA-256 {digest}, not checked: there is no w.pt.sha256" in caplog.text
        (tmp_path / "w.pt.sha256").write_text(f"{digest.upper()} *w.pt\n")
        load_source_weights(tiny_network(), tmp_path / "w.pt")
        assert f"SHA-256 {digest}, as in w.pt.sha256" in caplog.text
    (tmp_path / "w.pt.sha256").write_text("nothing")
    with pytest.raises(ValueError, match=r"w.pt.sha256 holds no SHA-256"):
        load_source_weights(tiny_network(), tmp_path / "w.pt")


def test_weights_in_the_old_format_load_and_the_log_says_that_damage_cannot_be_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tiny_network(seed=4).state_dict()
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    network = tiny_network(seed=5)
    with caplog.at_level("WARNING", logger="mgipt_monai"):
        load_source_weights(network, tmp_path / "w.pt")
    assert "without check sums: damage to it cannot be noticed" in caplog.text
    assert identical(snapshot(network), snapshot(tiny_network(seed=4)))


def test_file_that_is_no_state_dict_is_a_sentence(tmp_path: Path) -> None:
    for content in ({"0.weight": 3}, {1: torch.ones(1)}, {}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"w.pt (is not a state dict of tensors|does not fit)"):
            load_source_weights(tiny_network(), tmp_path / "w.pt")


GOOD: dict[str, Any] = {
    "version": 1,
    "images": 3,
    "fingerprint": "0" * 64,
    "layers": {"1": {"mean": torch.zeros(4), "std": torch.ones(4)}},
}


def layer(**values: Any) -> dict[str, Any]:
    return {"layers": {"1": {"mean": torch.zeros(4), "std": torch.ones(4), **values}}}


@pytest.mark.parametrize(
    "change",
    [
        {"images": 0},
        {"images": -3},
        {"images": True},
        {"images": 2.5},
        {"images": "3"},
        {"fingerprint": 7},
        {"layers": {}},
        {"layers": []},
        {"layers": {1: {"mean": torch.zeros(4), "std": torch.ones(4)}}},
        {"layers": {"1": 3}},
        layer(std=-torch.ones(4)),
        layer(std=torch.full((4,), torch.nan)),
        layer(mean=torch.full((4,), torch.inf)),
        layer(mean=torch.zeros(3)),
        layer(mean=torch.zeros(2, 2), std=torch.ones(2, 2)),
        layer(mean=torch.zeros(0), std=torch.zeros(0)),
        layer(mean=torch.zeros(4, dtype=torch.float64)),
        layer(mean=torch.zeros(4, dtype=torch.int64)),
        layer(mean=torch.zeros(4).to_sparse()),
        layer(mean=[0.0] * 4),
        layer(mean=None),
    ],
    ids=str,
)
def test_statistics_of_other_types_or_ranges_are_refused_with_the_file(change: dict[str, Any], tmp_path: Path) -> None:
    save_state(GOOD, tmp_path / "s.pt")
    SourceStatistics.load(tmp_path / "s.pt")
    save_state({**GOOD, **change}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s.pt is not a readable statistics file \(.*: recreate it with"):
        SourceStatistics.load(tmp_path / "s.pt")
    if isinstance(change.get("layers"), dict) and isinstance(change["layers"].get("1"), dict):
        with pytest.raises(ValueError, match="the statistics"):
            SourceStatistics({"1": LayerStatistics(**change["layers"]["1"])}, 3, "0" * 64)


def test_trained_weights_come_with_their_fingerprint_and_a_flipped_bit_stops_the_next_run(
    tmp_path: Path, demo_sites: Path
) -> None:
    settings = {"dataset_dir": demo_sites / "cold_noisy", **QUICK}
    out = tmp_path / "trained"
    run_bundle(
        [CONFIGS / "inference.yaml", CONFIGS / "train.yaml"], output_dir=out, max_epochs=2, batch_size=2, **settings
    )
    content = (out / "model.pt").read_bytes()
    assert (out / "model.pt.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  model.pt\n"
    settings |= {"ckpt_path": out / "model.pt", "output_dir": tmp_path / "out", "limit": 1}
    run_bundle([CONFIGS / "inference.yaml"], **settings)
    (out / "model.pt").write_bytes(flipped(content, np.random.default_rng(1)))
    done = run_bundle([CONFIGS / "inference.yaml"], check=False, **settings)
    assert done.returncode != 0
    assert "model.pt are not those of" in done.stderr
    assert json.dumps(str(out))[1:-1] in done.stderr
