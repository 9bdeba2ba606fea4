# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation of a TorchIO pipeline that cuts volumes with a GridSampler and joins them with a GridAggregator.

    pip install torchio
    python examples/torchio_grid.py

The loop over patches becomes an inferer. The method then adapts to the whole volume, once, and predicts it through that
loop. A patch never reaches the method as an image: each would get prompts of its own and a place in the stream.
The volumes and the network's weights are random. Put your own in their place.
"""

from collections.abc import Callable

import torch
import torchio as tio
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor

from mgipt_monai import MGIPT, AdaptiveInferer


class GridInferer(SlidingWindowInferer):
    """The usual loop of TorchIO, for one volume after another.

    Args:
        patch_size: sides of a patch. MONAI calls it `roi_size`; the method measures its loss in patches of this size.
        patch_overlap: voxels that neighbouring patches share, even.
        batch_size: patches that go through the network together.
    """

    def __init__(self, patch_size: tuple[int, int, int], patch_overlap: int, batch_size: int) -> None:
        super().__init__(roi_size=patch_size, sw_batch_size=batch_size)
        self.patch_overlap = patch_overlap

    def __call__(self, inputs: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Return logits (B, K, *spatial) of volumes (B, C, *spatial)."""
        logits = []
        for volume in inputs:
            subject = tio.Subject(image=tio.ScalarImage(tensor=volume))
            sampler = tio.GridSampler(subject, self.roi_size, self.patch_overlap)
            aggregator = tio.GridAggregator(sampler, overlap_mode="hann")
            for patches in tio.SubjectsLoader(sampler, batch_size=self.sw_batch_size):
                aggregator.add_batch(network(patches["image"][tio.DATA]), patches[tio.LOCATION])
            logits.append(aggregator.get_output_tensor())
        return torch.stack(logits).to(inputs.device)


torch.manual_seed(0)
network = UNet(3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch").eval()  # yours, trained
subjects = [tio.Subject(image=tio.ScalarImage(tensor=torch.rand(1, *sides))) for sides in [(24, 20, 16), (20, 28, 16)]]
subjects = tio.SubjectsDataset(subjects, transform=tio.RescaleIntensity((0, 1)))

# `steps=2` keeps this example short
adapted = AdaptiveInferer(MGIPT(network, head="softmax", steps=2), GridInferer((16, 16, 16), 4, batch_size=4))

for subject in subjects:
    logits = adapted(subject["image"][tio.DATA][None], network)
    subject.add_image(tio.LabelMap(tensor=logits.argmax(dim=1), affine=subject["image"].affine), "mask")
    (record,) = adapted.method.last
    print(f"volume {record['index']}: one image, mask of {subject['mask'].spatial_shape} voxels")
