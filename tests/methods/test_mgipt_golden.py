# SPDX-License-Identifier: Apache-2.0
"""The released procedure, number for number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from mgipt_monai import MGIPT
from tests import golden_inputs

DATA = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_released_setting_matches_the_released_outputs(seed: int) -> None:
    golden = np.load(DATA / f"mgipt_seed{seed}.npz")
    mgipt = MGIPT.released(golden_inputs.network(seed), jitter=golden_inputs.jitter)
    for i in range(4):
        probability = mgipt(golden_inputs.image(1000 * seed + i)).sigmoid()[0]

        np.testing.assert_allclose(probability[:, ::8, ::8], golden[f"out{i}"], atol=1e-4)
        area = (probability > 0.5).sum(dim=(1, 2)).numpy()
        assert np.abs(area - golden[f"mask_area{i}"]).max() <= 2
        for role, prompts in (("student", mgipt.global_prompts.students), ("teacher", mgipt.global_prompts.teachers)):
            for prompt in prompts:
                np.testing.assert_allclose(prompt[0], golden[f"{role}{i}_{prompt.shape[-1]}"], atol=1e-3)
        instance = mgipt.instance_prompt.amplitude
        margin = (golden[f"instance{i}"].shape[-1] - instance.shape[-1]) // 2
        np.testing.assert_allclose(pad(instance, [margin] * 4, value=1.0)[0], golden[f"instance{i}"], atol=1e-3)


def test_released_polyp_setting_is_reached_by_overriding() -> None:
    mgipt = MGIPT.released(
        golden_inputs.network(1, out_channels=1), lr=0.01, steps=6, global_sizes=(1, 2, 3), aligned_layers=r"^[14]$"
    )
    logits = mgipt(golden_inputs.image(5, size=32))
    assert logits.shape == (1, 1, 32, 32)
    assert [prompt.shape[-1] for prompt in mgipt.global_prompts.teachers] == [1, 2, 3]
    assert list(mgipt.norms.layers) == ["1", "4"]
    assert mgipt.last[0]["backwards"] in (3 + 12, 3 + 18)
    assert torch.isfinite(logits).all()
