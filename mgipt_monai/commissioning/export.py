# SPDX-License-Identifier: Apache-2.0
"""A commissioned network as a plain one, which runs without this package: TorchScript, ONNX, or other weights."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
from monai.data import save_net_with_metadata
from torch import Tensor, nn

from mgipt_monai.installed import require
from mgipt_monai.methods import SiteSetting
from mgipt_monai.networks.alignment.windows import network_turn
from mgipt_monai.networks.folding import fold
from mgipt_monai.utils.outputs import OutputFolder, output_file
from mgipt_monai.utils.provenance import fingerprint, versions

__all__ = ["export_adapted", "export_file", "export_site"]

logger = logging.getLogger(__name__)

ENDINGS = (".ts", ".onnx", ".pt")


def export_adapted(network: nn.Module, site: SiteSetting | str | os.PathLike[str]) -> nn.Module:
    """Fold a site's correction into a copy of the network, which then predicts as the commissioned method at 1 F.

    The copy has no class of this package but the network's own, so that ``torch.jit.script``, ``torch.jit.trace`` and
    ``torch.onnx.export`` treat it as they treat the network:

    - Shifted batch norm has other stored statistics.
    - Shifted instance and group norm become a ``torch.fx.GraphModule`` of the same name, as they blend the image's
      statistics with the site's.
    - Offset and temperature are in the weights of the last layers where the network's code shows that it ends in a
      convolution, or a sum with one. Else they are a ``GraphModule`` behind the network. Prompts are one before it.

    Args:
        network: the network that was commissioned, with the same weights; it does not change, not a bit.
        site: what :func:`mgipt_monai.commission` found, the path of the file with it (``site.pt``), or of its folder.

    Returns:
        The network in evaluation mode, without gradients: images (B, C, \\*spatial) to logits (B, K, \\*spatial).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the site was commissioned with other weights, or with a method that goes on adapting, which needs
            this package; or if the correction does not fit the network.

    Example:
        >>> from mgipt_monai.networks.correction import Correction
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1))
        >>> site = SiteSetting(fingerprint(network), {"class": "Source"}, Correction(offset=torch.tensor([2.0])))
        >>> exported = export_adapted(network, site)
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(exported(image), network(image) + 2)
        True
        >>> torch.equal(exported[2].bias, network[2].bias + 2)
        True
    """
    setting = _read(site)
    method = setting.method.get("class")
    if method != "Source":
        raise ValueError(
            f"the site was commissioned with {method}, which goes on adapting to each image and needs mgipt_monai: "
            'deploy it with site.yaml, or commission the site with --candidates "none + offset, none + norms"'
        )
    found = fingerprint(network)
    if found != setting.fingerprint:
        raise ValueError(
            f"the site was commissioned with other weights than this {type(network).__name__} has "
            f"(fingerprint {setting.fingerprint[:12]}, not {found[:12]}): load those, or commission the site again"
        )
    with network_turn(network):
        return fold(network, setting.correction)


def _read(site: SiteSetting | str | os.PathLike[str]) -> SiteSetting:
    if isinstance(site, SiteSetting):
        return site
    path = Path(site)
    if path.is_dir():
        path = path / "site.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}: commissioning deployed no correction, the network is as it is"
            )
    return SiteSetting.load(path)


def export_file(path: str | os.PathLike[str]) -> tuple[OutputFolder, str]:
    """Check where a network is to be written, before any work; return its folder and name.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
        ModuleNotFoundError: for ONNX without the extra ``export``.
        ValueError: for an unknown ending.
    """
    ending = Path(path).suffix
    if ending not in ENDINGS:
        raise ValueError(
            f"{path} must end in .ts (TorchScript), .onnx (ONNX) or .pt (weights for the unchanged network)"
        )
    if ending == ".onnx":
        require("export")
    return output_file(path)


def export_site(
    network: nn.Module,
    site: SiteSetting | str | os.PathLike[str],
    path: str | os.PathLike[str],
    example: Tensor,
    use_trace: bool = False,
) -> None:
    """Write a network with a site's correction to a file of a format that needs no package of ours.

    Args:
        network: as for :func:`export_adapted`.
        site: as for :func:`export_adapted`.
        path: its ending is the format: ``.ts``, TorchScript as MONAI's ``ckpt_export`` writes it; ``.onnx``, for
            batches of any size of images of the example's size, from ``image`` to ``logits``; ``.pt``, a state dict for
            the unchanged network, if the correction is in its weights.
        example: an image (1, C, \\*spatial) of the size that the network gets; its values do not matter.
        use_trace: trace the network with the example instead of compiling its code, for ``.ts``.

    Raises:
        FileExistsError: if a file stands there that no run wrote.
        ModuleNotFoundError: for ONNX without the extra ``export``.
        RuntimeError: for a network that TorchScript or ONNX does not take.
        ValueError: as :func:`export_adapted`; for an unknown ending, or ``.pt`` if it would need another layer.
    """
    folder, name = export_file(path)
    setting = _read(site)
    plain = export_adapted(network, setting)
    example = example.to(next(plain.parameters(), example))
    ending = Path(name).suffix
    meta = {"site": {"weights": setting.fingerprint, "correction": setting.correction.digest}, "versions": versions()}
    if ending == ".pt":
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        state = plain.state_dict()
        if {key: value.shape for key, value in state.items()} != shapes:
            raise ValueError(
                f"the correction needs a layer that {type(network).__name__} does not have, so that weights alone do "
                "not hold it: write a .ts or .onnx file"
            )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated, and warns of each shape it traces
        compiled = None
        if ending == ".ts":
            try:
                compiled = torch.jit.trace(plain, example) if use_trace else torch.jit.script(plain)
            except Exception as error:
                other = "" if use_trace else ": try --use_trace True"
                raise RuntimeError(
                    f"TorchScript does not take {type(network).__name__} ({_first(error)}){other}"
                ) from None
        with folder.writing(name) as part:
            if ending == ".pt":
                torch.save(state, part)
            elif compiled is not None:
                with open(part, "wb") as file:
                    save_net_with_metadata(compiled, file, meta_values=meta)
            else:
                _write_onnx(plain, example, part)
    logger.info("%s: %s with the site's correction %s", path, type(network).__name__, setting.correction.digest[:12])


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> None:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        network,
        (example,),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
