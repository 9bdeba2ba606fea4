# SPDX-License-Identifier: Apache-2.0
"""An exported network predicts as the commissioned method, without this package, and its source stays as it is."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import load_net_with_metadata
from monai.networks.nets import SwinUNETR, UNet
from torch import nn

from mgipt_monai import Source, export_adapted
from mgipt_monai.commissioning import export_site
from mgipt_monai.methods import Commissioned, SiteSetting
from mgipt_monai.networks.correction import Correction, NormShift, is_shifted
from mgipt_monai.utils.provenance import fingerprint
from tests.conftest import identical, snapshot, stream

NORMS: dict[str, Any] = {"batch": "batch", "instance": "instance", "group": ("group", {"num_groups": 2})}


def unet(dims: int = 2, norm: str = "batch", num_res_units: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    network = UNet(dims, 3, classes, (4, 8, 8), (2, 2), norm=NORMS[norm], num_res_units=num_res_units).eval()
    for layer in network.modules():
        if norm == "batch" and is_shifted(layer):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return network


def norms_of(network: nn.Module) -> dict[str, NormShift]:
    generator = torch.Generator().manual_seed(1)
    shifts = {}
    for name, layer in network.named_modules():
        if is_shifted(layer):
            count = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
            mean, std = torch.randn(count, generator=generator) * 0.3, torch.rand(count, generator=generator) + 0.5
            shifts[name] = NormShift(torch.rand(2, generator=generator), mean, std)
    return shifts


def prompts(dims: int) -> tuple[torch.Tensor, ...]:
    return tuple(1 + 0.2 * torch.randn(1, 3, *[side] * dims) for side in (1, 3, 5, 4))


def setting(network: nn.Module, correction: Correction) -> SiteSetting:
    return SiteSetting(fingerprint(network), {"class": "Source"}, correction)


def assert_same(network: nn.Module, correction: Correction, images: torch.Tensor) -> nn.Module:
    """Check that the exported network predicts as the method, and TorchScript as both; return it."""
    site, before = setting(network, correction), snapshot(network)
    expected = Commissioned(Source(network), site)(images)
    exported = export_adapted(network, site)
    assert not torch.allclose(expected, network(images), atol=1e-3)
    assert torch.allclose(exported(images), expected, atol=1e-5)
    assert torch.allclose(torch.jit.script(exported)(images), expected, atol=1e-5)
    assert torch.allclose(torch.jit.trace(exported, images[:1])(images), expected, atol=1e-5)
    assert identical(before, snapshot(network))
    assert not any(type(module).__module__.startswith("mgipt_monai") for module in exported.modules())
    assert not any(parameter.requires_grad for parameter in exported.parameters())
    assert {value.data_ptr() for value in exported.parameters()}.isdisjoint(v.data_ptr() for v in network.parameters())
    return exported


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [2, 3])
def test_norms_and_offset(norm: str, dims: int) -> None:
    network, images = unet(dims, norm), torch.cat(stream(2, size=16, dims=dims))
    exported = assert_same(network, Correction(torch.tensor([0.5, -1.0]), 1.6, norms=norms_of(network)), images)
    # batch norm takes other statistics; the others need layers
    assert (exported.state_dict().keys() == network.state_dict().keys()) == (norm == "batch")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_res_units", [0, 2])
@pytest.mark.parametrize("classes", [1, 3])  # as with a sigmoid, and with a softmax
def test_offset_and_temperature_are_in_the_last_layers(temperature: float, num_res_units: int, classes: int) -> None:
    network = unet(num_res_units=num_res_units, classes=classes)
    correction = Correction(torch.linspace(-1, 1.5, classes), temperature)
    exported = assert_same(network, correction, torch.cat(stream(2)))
    again = copy.deepcopy(network)
    again.load_state_dict(exported.state_dict())
    assert torch.equal(again(stream(1)[0]), exported(stream(1)[0]))


@pytest.mark.parametrize("dims", [2, 3])
def test_prompts_change_images_of_any_size(dims: int) -> None:
    network, correction = unet(dims), Correction(torch.tensor([0.5, -1.0]), prompts=prompts(dims))
    exported = assert_same(network, correction, torch.cat(stream(2, size=16, dims=dims)))
    image = torch.rand(1, 3, *(8, 20, 12)[:dims])
    script = torch.jit.script(exported)
    assert torch.allclose(script(image), Commissioned(Source(network), setting(network, correction))(image), atol=1e-5)
    with pytest.raises(Exception, match="smaller than the site's prompts"):
        script(image[..., :4])


class Doubled(nn.Module):
    """Ends in a convolution that also serves in its middle, or in what is no layer."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1, bias=end != "no bias")
        self.end = end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.end == "no bias":
            return self.last(x)
        if self.end == "twice":
            return self.last(self.last(x))
        y = self.last(x)
        if self.end == "seen":
            return y + torch.relu(y)
        return torch.tanh(y) if self.end == "other" else y + y


@pytest.mark.parametrize("end", ["no bias", "twice", "seen", "other", "self"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ends_of_other_networks(end: str, temperature: float) -> None:
    assert_same(Doubled(end).eval(), Correction(torch.tensor([0.5, -1.0]), temperature), torch.cat(stream(2)))


def test_layer_that_is_used_at_two_places_and_one_without_weights() -> None:
    shared = nn.InstanceNorm2d(4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 2, 1)).eval()
    assert_same(network, Correction(norms=norms_of(network)), torch.cat(stream(2)))


def test_network_that_cannot_be_followed_gets_a_layer_behind() -> None:
    torch.manual_seed(0)
    network = SwinUNETR(3, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), spatial_dims=2).eval()
    site = setting(network, Correction(torch.tensor([0.5, -1.0]), 2.0))
    image = torch.rand(1, 3, 64, 64)
    expected = Commissioned(Source(network), site)(image)
    exported = export_adapted(network, site)
    assert torch.allclose(torch.jit.trace(exported, image)(image), expected, atol=1e-5)
    assert [name for name, _ in exported.named_children()] == ["network", "logits"]


def test_nothing_to_correct_is_the_network() -> None:
    network, image = unet(), stream(1)[0]
    exported = export_adapted(network, setting(network, Correction()))
    assert type(exported) is UNet
    assert torch.equal(exported(image), network(image))


def test_refused() -> None:
    network, offset = unet(), Correction(torch.zeros(2))
    for method in ("SiteCorrection", "MGIPT"):
        with pytest.raises(
            ValueError, match=f"commissioned with {method}, which goes on adapting .* needs mgipt_monai"
        ):
            export_adapted(network, SiteSetting(fingerprint(network), {"class": method}, offset))
    with pytest.raises(ValueError, match="other weights than this UNet has"):
        export_adapted(unet(num_res_units=1), setting(network, offset))
    with pytest.raises(ValueError, match="the offset is for 3 channels, the network has 2"):
        export_adapted(network, setting(network, Correction(torch.zeros(3))))
    shift = NormShift(torch.ones(2), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="has no norm layer nowhere"):
        export_adapted(network, setting(network, Correction(norms={"nowhere": shift})))


def test_folder_of_a_site_that_deploys_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="commissioning deployed no correction"):
        export_adapted(unet(), tmp_path)


SERVE = """
import sys
sys.modules["mgipt_monai"] = sys.modules["monai"] = None  # neither can be imported
import torch
network, images, expected = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
assert torch.allclose(network(images), expected, atol=1e-5)
"""


@pytest.mark.parametrize("use_trace", [False, True])
def test_torchscript_runs_where_there_is_no_package(use_trace: bool, tmp_path: Path) -> None:
    network, images = unet(3, "instance"), torch.cat(stream(2, size=16, dims=3))
    site = setting(network, Correction(torch.tensor([0.5, -1.0]), 1.6, prompts(3), norms_of(network)))
    site.save(tmp_path / "site.pt")
    export_site(network, tmp_path, tmp_path / "network.ts", images[:1], use_trace=use_trace)
    torch.save((images, Commissioned(Source(network), site)(images)), tmp_path / "expected.pt")
    words = [sys.executable, "-c", SERVE, tmp_path / "network.ts", tmp_path / "expected.pt"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, meta, _ = load_net_with_metadata(tmp_path / "network.ts")
    assert meta["site"] == {"weights": site.fingerprint, "correction": site.correction.digest}


@pytest.mark.parametrize(
    ("network", "with_prompts"),
    [(unet(), False), (unet(num_res_units=2), True), (unet(3, "instance"), True), (unet(2, "group"), False)],
    ids=["batch", "batch prompts", "3D instance prompts", "group"],
)
def test_onnx(network: nn.Module, with_prompts: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    dims = next(module.weight.ndim - 2 for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
    images = torch.cat(stream(3, size=16, dims=dims))
    correction = Correction(
        torch.tensor([0.5, -1.0]), 1.6, prompts(dims) if with_prompts else (), norms=norms_of(network)
    )
    site, path = setting(network, correction), tmp_path / "network.onnx"
    export_site(network, site, path, images[:1])
    found = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images.numpy()})
    assert torch.allclose(torch.from_numpy(found[0]), Commissioned(Source(network), site)(images), atol=1e-5)


def test_weights_load_into_the_same_network_and_only_where_that_is_all(tmp_path: Path) -> None:
    network, image = unet(num_res_units=2), stream(1)[0]
    site = setting(network, Correction(torch.tensor([0.5, -1.0]), 1.6, norms=norms_of(network)))
    export_site(network, site, tmp_path / "network.pt", image)
    other = copy.deepcopy(network)
    other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.allclose(other(image), Commissioned(Source(network), site)(image), atol=1e-5)
    with_prompts = setting(network, Correction(prompts=prompts(2)))
    with pytest.raises(ValueError, match="needs a layer that UNet does not have"):
        export_site(network, with_prompts, tmp_path / "prompts.pt", image)
    assert not (tmp_path / "prompts.pt").exists()


def test_files_of_others_and_unknown_endings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = unet(), stream(1)[0]
    site = setting(network, Correction(torch.ones(2)))
    mine = tmp_path / "mine.ts"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by a run"):
        export_site(network, site, mine, image)
    assert mine.read_text() == "mine"
    with pytest.raises(ValueError, match=r"must end in \.ts"):
        export_site(network, site, tmp_path / "network.engine", image)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"mgipt_monai\[export\]\""):
        export_site(network, site, tmp_path / "network.onnx", image)
    for _ in range(2):  # its own it writes again
        export_site(network, site, tmp_path / "network.ts", image)
    assert torch.jit.load(io.BytesIO((tmp_path / "network.ts").read_bytes()))(image).shape == (1, 2, 24, 24)


def test_torchscript_that_a_network_does_not_take_names_the_other_way(tmp_path: Path) -> None:
    class Untyped(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[{"all": ...}["all"]]

    network, image = Untyped(3, 2, 1), stream(1)[0]
    site = setting(network, Correction(torch.ones(2)))
    with pytest.raises(RuntimeError, match=r"TorchScript does not take Untyped .* try --use_trace True"):
        export_site(network, site, tmp_path / "network.ts", image)
    assert not (tmp_path / "network.ts").exists()
    export_site(network, site, tmp_path / "network.ts", image, use_trace=True)
