# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import PatchInferer, SlidingWindowInferer
from torch import Tensor, nn
from torch.nn import functional

from mgipt_monai import MGIPT, SourceStatistics, measure_source_statistics
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import MixedNet, identical, snapshot, stream, tiny_network

MEASURE = "mgipt source-statistics SOURCE_IMAGES FILE --weights WEIGHTS"


def same(one: SourceStatistics, other: SourceStatistics) -> bool:
    return (
        (one.images, one.fingerprint, list(one.layers)) == (other.images, other.fingerprint, list(other.layers))
    ) and all(identical(vars(one.layers[name]), vars(other.layers[name])) for name in one.layers)


def expected_statistics(features: Tensor) -> dict[str, Tensor]:
    """From features of all images (N, C, *spatial), written out."""
    flat = features.detach().double().flatten(2)
    means, stds = flat.mean(dim=2), flat.std(dim=2)
    return {
        "mean": means.mean(dim=0),
        "std": stds.mean(dim=0),
    }


def test_values_are_those_of_each_norm_layers_input() -> None:
    network, images = MixedNet(), stream(5)
    statistics = measure_source_statistics(network, images)
    taken = network.norm_inputs(torch.cat(images))
    assert list(statistics.layers) == ["instance", "group", "layer"]
    assert (statistics.images, statistics.fingerprint) == (5, fingerprint(network))
    for name, features in taken.items():
        for key, value in expected_statistics(features).items():
            measured = getattr(statistics.layers[name], key)
            assert (measured.dtype, measured.shape) == (torch.float32, (4,))
            torch.testing.assert_close(measured.double(), value, atol=1e-6, rtol=1e-4)


def test_values_of_a_network_without_norm_layers_are_those_behind_its_convolutions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2))
    images = stream(3)
    statistics = measure_source_statistics(network, images)
    first = network[0](torch.cat(images))
    for name, given in (("0", first), ("2", network[2](first.relu()))):
        for key, value in expected_statistics(given).items():
            torch.testing.assert_close(getattr(statistics.layers[name], key).double(), value, atol=1e-6, rtol=1e-4)


def test_batch_norm_is_measured_where_it_normalises_with_what_it_stores() -> None:
    network, images = tiny_network(), stream(3)
    statistics = measure_source_statistics(network, images)
    value = expected_statistics(network[0](torch.cat(images)))
    torch.testing.assert_close(statistics.layers["1"].mean.double(), value["mean"], atol=1e-6, rtol=1e-4)
    assert (statistics.layers["1"].mean - network[1].running_mean).abs().max() > 0.1


def test_batches_dicts_and_meta_tensors_give_the_same() -> None:
    network, images = MixedNet(), stream(4)
    expected = measure_source_statistics(network, images)
    batches = [{"image": torch.cat(images[:2]), "name": ["a", "b"]}, {"image": MetaTensor(torch.cat(images[2:]))}]
    assert same(measure_source_statistics(network, iter(batches)), expected)
    assert same(measure_source_statistics(network, [torch.cat(images).double()], device="cpu"), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(measure_source_statistics(network, images), expected)


def test_images_may_differ_in_size() -> None:
    network, images = MixedNet(), [*stream(1, size=16), *stream(1, size=20)]
    apart = [measure_source_statistics(network, [image]).layers["group"].mean for image in images]
    together = measure_source_statistics(network, images).layers["group"].mean
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)


def test_each_window_counts_as_an_image_the_windows_that_adaptation_looks_at() -> None:
    network, image = MixedNet(), stream(1, size=32)[0]
    image[..., :16] *= torch.linspace(1, 3, 16)  # of more contrast, so that the two left windows are looked at
    sliding = SlidingWindowInferer(roi_size=16, sw_batch_size=4, overlap=0.5)
    measured = measure_source_statistics(network, [image], inferer=sliding, windows=2)
    crops = measure_source_statistics(network, [image[..., :16, :16], image[..., 16:, :16]])
    assert (measured.images, crops.images) == (1, 2)
    for name, layer in measured.layers.items():
        assert identical(vars(layer), vars(crops.layers[name]))


def test_images_smaller_than_the_window_are_padded_as_in_adaptation() -> None:
    network, images = MixedNet(), stream(2, size=12)
    sliding = SlidingWindowInferer(roi_size=16, padding_mode="replicate")
    measured = measure_source_statistics(network, images, inferer=sliding)
    padded = measure_source_statistics(network, [functional.pad(image, [2] * 4, mode="replicate") for image in images])
    assert same(measured, padded)


def test_inferer_that_adaptation_cannot_predict_through_is_refused() -> None:
    with pytest.raises(TypeError, match="not through a PatchInferer"):
        measure_source_statistics(MixedNet(), stream(1), inferer=PatchInferer(splitter=None))


def test_bad_source_image_is_named_by_its_file() -> None:
    files = ["a.png", "b.png", "c.png"]
    batch = MetaTensor(torch.cat(stream(3)), meta={"filename_or_obj": files})
    batch[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"source image 2 \(b.png\) has NaN"):
        measure_source_statistics(MixedNet(), [{"image": batch}])


@pytest.mark.parametrize("stop", [False, True])
def test_network_is_as_it_was_even_after_an_error(stop: bool) -> None:
    network = MixedNet().train()
    network.group.eval()  # a flag that differs from the others must survive too
    network.head.requires_grad_(False)
    before, modes = snapshot(network), [module.training for module in network.modules()]

    def images():
        yield stream(1)[0]
        assert not network.training
        if stop:
            raise KeyboardInterrupt

    if stop:
        with pytest.raises(KeyboardInterrupt):
            measure_source_statistics(network, images())
    else:
        measure_source_statistics(network, images())
    assert identical(before, snapshot(network))
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks for module in network.modules())
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("pattern", "names"), [(None, 3), ("^group$", 1), ("instance|layer", 2)])
def test_pattern_selects_the_layers_by_name(pattern: str | None, names: int) -> None:
    assert len(measure_source_statistics(MixedNet(), stream(1), pattern).layers) == names


def test_layer_norms_over_several_axes_do_not_count() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([24, 24]))
    assert list(measure_source_statistics(network, stream(1)).layers) == ["0"]


def overflowing() -> MixedNet:
    network = MixedNet()
    network.convs[1].weight.data.fill_(float("inf"))
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (MixedNet(), [], None), "no source images"),
        (lambda: (MixedNet(), [stream(1)[0], stream(1)[0] * float("nan")], None), "source image 2 has NaN or infinite"),
        (lambda: (MixedNet(), stream(1), "decoder"), "'decoder' matches no norm layer .*instance, group, layer"),
        (lambda: (nn.Linear(8, 8), stream(1), None), "Linear has neither a norm layer nor a convolution"),
        (lambda: (MixedNet(), [{"failure": ["a.png is empty"]}], None), "no image: .*a.png is empty"),
        (lambda: (overflowing(), stream(1), None), "layer group are not finite"),
        (lambda: (nn.LayerNorm(4), [torch.rand(2, 4)], None), "none of the layers has .* spatial axes"),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_source_statistics(*make())


def test_file_round_trip(tmp_path: Path) -> None:
    network = MixedNet()
    statistics = measure_source_statistics(network, stream(3))
    path = tmp_path / "new" / "statistics.pt"
    statistics.save(path)
    loaded = SourceStatistics.load(path)
    assert same(loaded, statistics)
    loaded.check(network)
    assert list(path.parent.iterdir()) == [path]
    assert set(torch.load(path, weights_only=True)) == {"version", "images", "fingerprint", "layers", "look"}
    assert identical(loaded.look.content()["tone"], statistics.look.content()["tone"])
    assert loaded.digest == statistics.digest


def test_other_weights_are_refused_with_the_command_that_helps() -> None:
    network = MixedNet()
    statistics = measure_source_statistics(network, stream(1))
    statistics.check(copy.deepcopy(network))
    network.head.bias.data[0] += 1
    with pytest.raises(ValueError, match=f"was made with other weights than this MixedNet.*{MEASURE}"):
        statistics.check(network)


def test_refused_statistics_are_named_by_their_file(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    measure_source_statistics(MixedNet(), stream(1)).save(path)
    with pytest.raises(ValueError, match=rf"the statistics file {path} was made with other weights"):
        SourceStatistics.load(path).check(MixedNet(seed=1))
    with pytest.raises(
        ValueError, match=rf"the statistics file {path} was made in another network, .* has no layer inst"
    ):
        MGIPT(tiny_network(), statistics=path)


def spoil(content: dict, how: str) -> object:
    layer = content["layers"]["group"]
    if how == "version":
        content["version"] = 2
    elif how == "key":
        del content["fingerprint"]
    elif how == "layer":
        del layer["std"]
    elif how == "shape":
        layer["std"] = layer["std"][:2]
    elif how == "number":
        layer["mean"][1] = float("nan")
    return content if how != "state dict" else MixedNet().state_dict()


@pytest.mark.parametrize("how", ["version", "key", "layer", "shape", "number", "state dict"])
def test_file_of_something_else_is_refused_with_its_name(tmp_path: Path, how: str) -> None:
    path = tmp_path / "statistics.pt"
    measure_source_statistics(MixedNet(), stream(1)).save(path)
    torch.save(spoil(torch.load(path, weights_only=True), how), path)
    with pytest.raises(ValueError, match=rf"statistics\.pt is not a readable statistics file.*{MEASURE}"):
        SourceStatistics.load(path)


def test_file_that_is_absent_broken_or_code_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    with pytest.raises(FileNotFoundError, match=rf"no statistics file at .*statistics\.pt.*{MEASURE}"):
        SourceStatistics.load(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable statistics file"):
        SourceStatistics.load(path)
    torch.save(MixedNet(), path)
    with pytest.raises(ValueError, match="not a readable statistics file"):
        SourceStatistics.load(path)


def test_file_of_version_0_1_with_the_images_spread_is_read(tmp_path: Path) -> None:
    statistics = measure_source_statistics(MixedNet(), stream(2))
    statistics.save(tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    for layer in content["layers"].values():
        layer |= {"mean_spread": layer["mean"] * 0, "std_spread": layer["std"] * 0}
    torch.save(content, tmp_path / "old.pt")
    read = SourceStatistics.load(tmp_path / "old.pt")
    assert all(identical(vars(read.layers[name]), vars(layer)) for name, layer in statistics.layers.items())


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    measure_source_statistics(MixedNet(), stream(2)).save(path)
    content = bytearray(path.read_bytes())
    value = torch.load(path, weights_only=True)["layers"]["group"]["mean"].numpy().tobytes()
    content[content.index(value) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable statistics file \(.* is damaged\)"):
        SourceStatistics.load(path)
