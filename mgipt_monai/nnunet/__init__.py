# SPDX-License-Identifier: Apache-2.0
"""Test-time adaptation of nnU-Nets (extra ``nnunet``): whole volumes, through nnU-Net's own sliding window."""

from mgipt_monai.installed import require

require("nnunet")

from mgipt_monai.nnunet.folds import FoldEnsemble  # noqa: E402 # after the check
from mgipt_monai.nnunet.predictor import AdaptivePredictor  # noqa: E402
from mgipt_monai.nnunet.sliding_window import NnunetSlices, NnunetWindows  # noqa: E402

__all__ = ["AdaptivePredictor", "FoldEnsemble", "NnunetSlices", "NnunetWindows"]
