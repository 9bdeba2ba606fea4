# SPDX-License-Identifier: Apache-2.0
"""The docstrings' Sphinx roles and examples as the API reference reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", flags=re.MULTILINE)
ROLE = re.compile(r":(?:py:)?(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")


class SphinxRoles(griffe.Extension):
    """Shows roles as code, and takes ``Example:`` for a section of examples."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
