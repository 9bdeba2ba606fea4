# SPDX-License-Identifier: Apache-2.0
"""Puts the bundle and the overlays, which lie beside the package here, into the package that is built."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INSTALLED = runpy.run_path(str(ROOT / "mgipt_monai" / "installed.py"))


class BuildWithBundle(build_py):
    """Builds the package with its two folders of data; an editable install finds them where they are."""

    def run(self) -> None:
        """Build anew: modules and configs that an earlier build left would be installed too."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "mgipt_monai"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for folder in INSTALLED["FILES"]:
            INSTALLED["copy_folder"](ROOT / folder, package / folder)


setup(cmdclass={"build_py": BuildWithBundle})
