# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation of a network of segmentation_models_pytorch.

    pip install segmentation-models-pytorch
    python examples/smp_unet.py

The images and the network's weights are random. Put your own in their place.
"""

import segmentation_models_pytorch as smp
import torch

from mgipt_monai import MGIPT, Source

torch.manual_seed(0)
network = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1).eval()  # yours, trained
images = torch.rand(2, 1, 3, 64, 64)  # in the range that your network was trained on; sides divisible by 32

# One structure per channel is a sigmoid head. The method needs logits: leave the network's `activation` at None.
# Networks of smp have batch norm and need no statistics file. `steps=2` keeps this short.
adapted = MGIPT(network, head="sigmoid", steps=2)
plain = Source(network)

for image in images:
    mask, before = adapted(image) > 0, plain(image) > 0
    (record,) = adapted.last
    print(f"image {record['index']}: {(mask != before).float().mean():.1%} of the pixels changed")
print(f"masks of {tuple(mask.shape[2:])} pixels")
