# SPDX-License-Identifier: Apache-2.0
"""Names of version 0.1 go on working, and warn."""

from __future__ import annotations

import importlib

import pytest
from monai.bundle import ConfigParser

import mgipt_monai
from mgipt_monai import _renamed
from tests.module_runs import run_module

OLD_NAMES = {
    "mgipt_monai.SiteCalibration": "mgipt_monai.methods.SiteCorrection",
    "mgipt_monai.methods.SiteCalibration": "mgipt_monai.methods.SiteCorrection",
    "mgipt_monai.networks.Guard": "mgipt_monai.methods.Guard",
    "mgipt_monai.networks.Verdict": "mgipt_monai.methods.Verdict",
    "mgipt_monai.losses.BoundaryWeightedLoss": "mgipt_monai.networks.nets.losses.BoundaryWeightedLoss",
    "mgipt_monai.stream_file.StreamFile": "mgipt_monai.stream.state_file.StreamFile",
    "mgipt_monai.persistent_inferer.PersistentInferer": "mgipt_monai.inferers.PersistentInferer",
    "mgipt_monai.methods.site_calibration.SiteCalibration": "mgipt_monai.methods.site_correction.SiteCorrection",
}


def find(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_name_is_the_new_object_and_warns_with_the_new_name(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {OLD_NAMES[old]};"):
        found = find(old)
    assert found is find(OLD_NAMES[old])


@pytest.mark.parametrize("old", _renamed.MODULES)
def test_every_old_module_gives_all_public_names_of_the_new_one(old: str) -> None:
    new = importlib.import_module(f"mgipt_monai.{_renamed.MODULES[old]}")
    module = importlib.import_module(f"mgipt_monai.{old}")
    for name in getattr(new, "__all__", ()):
        with pytest.warns(DeprecationWarning, match=rf"mgipt_monai\.{old}\.{name} is now"):
            assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="it is now mgipt_monai"):
        _ = module.no_such_name


def test_old_target_works_in_a_config() -> None:
    config = {"guard": {"_target_": "mgipt_monai.networks.Guard", "warm_up": 3}}
    with pytest.warns(DeprecationWarning, match=r"mgipt_monai\.methods\.Guard"):
        guard = ConfigParser(config).get_parsed_content("guard")
    assert isinstance(guard, mgipt_monai.methods.Guard)
    assert guard.warm_up == 3


def test_old_command_runs_the_new_one() -> None:
    done = run_module("mgipt_monai.state", ["show", "no_such_file.pt"])
    assert done.returncode == 2
    assert "python -m mgipt_monai.state is now python -m mgipt_monai.stream.command" in done.stderr
    assert "no_such_file.pt" in done.stderr


def test_unknown_module_is_still_unknown() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mgipt_monai.networks.no_such_module")
