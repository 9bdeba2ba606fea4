# SPDX-License-Identifier: Apache-2.0
"""``python -m mgipt_monai`` is the command ``mgipt``."""

from __future__ import annotations

import sys

from mgipt_monai.cli import main

if __name__ == "__main__":
    sys.exit(main())
