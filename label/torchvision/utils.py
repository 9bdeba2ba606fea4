# SPDX-License-Identifier: Apache-2.0
"""The two names that MONAI Label imports; nothing that is served here calls them."""


def make_grid(*args: object, **kwargs: object) -> None:
    """Refuse: this is not torchvision."""
    raise NotImplementedError("torchvision is not installed: this environment has a stand-in for it")


save_image = make_grid
