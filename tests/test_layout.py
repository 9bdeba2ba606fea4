# SPDX-License-Identifier: Apache-2.0
"""How the package is laid out: few modules in its root, the method in one file, imports that point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mgipt_monai"
MODULES = {
    ".".join(("mgipt_monai", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The package's modules that one imports when it is imported."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found & MODULES.keys() - {module}


IMPORTS = {module: imported(module) for module in MODULES}


def test_imports_have_no_circle() -> None:
    left = dict(IMPORTS)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("utils", set()),
        ("networks", {"utils", "_renamed"}),
        ("methods", {"networks", "utils", "_renamed"}),
        ("stream", {"methods", "networks", "utils"}),
        ("report", {"stream", "utils", "installed"}),
    ],
)
def test_a_package_imports_only_what_lies_below_it(package: str, others: set[str]) -> None:
    own = f"mgipt_monai.{package}"
    used = {
        other.split(".")[1]
        for module in MODULES
        if module == own or module.startswith(f"{own}.")
        for other in IMPORTS[module]
        if other != "mgipt_monai"
    }
    assert used - {package} <= others


def test_root_is_small_and_the_method_is_one_file() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    method = (PACKAGE / "methods" / "mgipt.py").read_text(encoding="utf-8").splitlines()
    assert len(method) <= 300
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()) <= 400
