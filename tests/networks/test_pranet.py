# SPDX-License-Identifier: Apache-2.0
"""PraNet against the keys and logits of the published network, in MONAI's trainer, and adapted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss

from mgipt_monai import MGIPT, load_source_weights
from mgipt_monai.networks import AlignedNorms, PraNet
from mgipt_monai.networks.alignment.layers import has_stored_statistics
from mgipt_monai.networks.nets.losses import BoundaryWeightedLoss
from tests.conftest import identical, snapshot
from tests.golden_inputs import fill, image

GOLDEN = Path(__file__).parents[1] / "golden" / "pranet.npz"
ENCODER = r"^resnet\."


@pytest.fixture(scope="module")
def filled() -> PraNet:
    """The network with the golden weights, in evaluation mode; tests leave it as it is."""
    return fill(PraNet(), 8, 0.75)


@pytest.fixture
def fresh() -> PraNet:
    torch.manual_seed(0)
    return PraNet()


def test_state_dict_keys_are_the_published_ones(filled: PraNet) -> None:
    with np.load(GOLDEN) as golden:
        published = golden["keys"].tolist()
    assert [f"{key} {tuple(value.shape)}" for key, value in filled.state_dict().items()] == published


def test_logits_are_those_of_the_published_network(filled: PraNet) -> None:
    with np.load(GOLDEN) as golden:
        published = torch.from_numpy(golden["logits"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = filled((image(80, 352) - mean) / std)
    assert logits.shape == (1, 1, 352, 352)
    # measured 4e-6 standard deviations; the nearest wrong structure that was tried is 7e-3 off
    assert (logits[0, :, ::8, ::8] - published).abs().max() <= 1e-3 * published.std()


def test_channels_follow_the_argument_and_sides_may_differ() -> None:
    with torch.no_grad():
        assert PraNet(in_channels=1).eval()(torch.rand(2, 1, 32, 64)).shape == (2, 1, 32, 64)


def test_training_mode_gives_the_prediction_first_and_then_the_maps_before_it(fresh: PraNet) -> None:
    images = torch.rand(2, 3, 64, 96)
    for layer in fresh.modules():
        if has_stored_statistics(layer):
            layer.eval()  # so that the two modes differ in nothing but the output
    last_convolutions = (fresh.ra4_conv5, fresh.ra3_conv4, fresh.ra2_conv4)
    with torch.no_grad():
        before = fresh(images)
        assert [tuple(output.shape) for output in before] == [(2, 1, 64, 96)] * 4
        for count, branch in zip((3, 2, 1), last_convolutions, strict=True):
            branch.bn.bias += 1
            after = fresh(images)
            changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
            assert changed == [True] * count + [False] * (4 - count)
            before = after
        assert torch.equal(before[0], fresh.eval()(images))


@pytest.mark.parametrize(("coarse", "is_blind"), [(40.0, True), (-40.0, False)])
def test_branches_see_the_image_only_where_the_map_so_far_says_background(
    coarse: float, is_blind: bool, fresh: PraNet
) -> None:
    with torch.no_grad():
        fresh.agg1.conv5.weight.zero_()
        fresh.agg1.conv5.bias.fill_(coarse)
        one, other = fresh.eval()(torch.rand(2, 3, 64, 64))
    assert torch.equal(one, other) == is_blind


@pytest.mark.parametrize("shape", [(1, 3, 64, 100), (1, 3, 0, 64), (3, 64, 64)])
def test_input_of_wrong_shape_is_refused_with_the_fix(shape: tuple[int, ...], filled: PraNet) -> None:
    message = rf"\({', '.join(map(str, shape))}\).*multiples of 32.*pad"
    with pytest.raises(ValueError, match=message):
        filled(torch.zeros(shape))


def test_monai_trainer_takes_a_step_on_the_papers_loss(fresh: PraNet) -> None:
    mask = torch.zeros(1, 64, 32)
    mask[:, 16:40, 12:24] = 1
    plain = BoundaryWeightedLoss()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset([{"image": torch.rand(3, 64, 32), "label": mask}] * 2), batch_size=2),
        network=fresh,
        optimizer=torch.optim.SGD(fresh.parameters(), lr=1e-3),
        loss_function=DeepSupervisionLoss(plain, weight_mode="same"),
    )
    before = snapshot(fresh)
    trainer.run()
    # MONAI has taken the batch apart: per image a list of the four outputs, and the loss of the batch
    of_images = [sum(plain(output[None], mask[None]) for output in row["pred"]) for row in trainer.state.output]
    assert trainer.state.output[0]["loss"] == pytest.approx(sum(of_images).item() / 2)
    # a step may be too small for a weight's rounding, but each weight has its gradient, and the optimiser took it
    unused = [name for name, weight in fresh.named_parameters() if weight.grad is None]
    assert unused == ["resnet.fc.weight", "resnet.fc.bias"]  # the ImageNet classifier
    for name, weight in fresh.named_parameters():
        if name not in unused:
            assert weight.grad.isfinite().all()
            torch.testing.assert_close(weight.detach(), before[name] - 1e-3 * weight.grad)
    moved = sum(not torch.equal(weight, before[name]) for name, weight in fresh.named_parameters())
    assert moved > 100


def test_monai_inferers_take_it_as_any_network(filled: PraNet) -> None:
    inferer = SlidingWindowInferer(roi_size=(64, 64), overlap=0)
    images = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        whole = inferer(images, filled)
        halves = torch.cat([filled(half) for half in images.split(64, dim=3)], dim=3)
    torch.testing.assert_close(whole, halves)


def test_the_documented_pattern_aligns_exactly_the_encoders_norms(filled: PraNet) -> None:
    aligned = AlignedNorms(filled, ENCODER).layers
    assert list(aligned.values()) == [layer for layer in filled.resnet.modules() if has_stored_statistics(layer)]
    # stem 3, sixteen blocks of 1 + 3 + 1, four shortcuts
    assert len(aligned) == 3 + 16 * 5 + 4
    assert ENCODER in PraNet.__doc__


def test_adaptation_leaves_every_weight_and_buffer_as_it_was(fresh: PraNet) -> None:
    fresh.eval()
    before = snapshot(fresh)
    mgipt = MGIPT(fresh, aligned_layers=ENCODER, steps=1, instance_sizes=(1,), global_sizes=(1, 3))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = mgipt(images)
    assert logits.shape == (1, 1, 64, 64)
    assert logits.isfinite().all()
    assert identical(before, snapshot(fresh))
    with torch.no_grad():
        assert not torch.equal(logits, fresh(images))


def test_published_checkpoint_loads_and_one_of_another_network_is_named_with_its_keys(
    tmp_path: Path, filled: PraNet, fresh: PraNet
) -> None:
    torch.save(filled.state_dict(), tmp_path / "polyp.pt")
    load_source_weights(fresh, tmp_path / "polyp.pt")
    assert identical(snapshot(fresh), snapshot(filled))
    torch.save(filled.resnet.state_dict(), tmp_path / "encoder.pt")
    with pytest.raises(
        ValueError, match=r"encoder.pt does not fit the network PraNet \(missing: resnet.conv1.0.weight"
    ):
        load_source_weights(fresh, tmp_path / "encoder.pt")
