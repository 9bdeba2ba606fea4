# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation in a plain PyTorch loop: a DataLoader, a network, argmax.

    python examples/plain_pytorch.py

The images and the network's weights are random. Put your own in their place.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from mgipt_monai import MGIPT, load_state, save_state

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
images = DataLoader(torch.rand(3, 3, 48, 64), batch_size=1)  # in order: a stream learns from what came before

# 1. Put the method in the network's place. `steps=3` keeps this example short.
adapted = MGIPT(network, head="softmax", steps=3)

# 2. The loop stays as it is. Images of one size may also come in batches: each is adapted to on its own.
masks = []
for image in images:
    masks.append(adapted(image).argmax(dim=1))
    (record,) = adapted.last
    print(f"image {record['index']}: instance prompt of side {record['instance_size']}, {record['forwards']} forwards")

# 3. What the stream has learnt is a small state, kept apart from the network, whose weights never change.
save_state(adapted.adaptation_state(), "stream.pt")
adapted.load_adaptation_state(load_state("stream.pt"))
print(f"{len(masks)} masks of {tuple(masks[0].shape[1:])} pixels")
