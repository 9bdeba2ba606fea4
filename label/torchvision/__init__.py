# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision, which MONAI Label imports for two functions and which needs another build of torch."""
