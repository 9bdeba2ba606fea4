# SPDX-License-Identifier: Apache-2.0
"""The bundle's configs run: for the model zoo's ``ci/unit_tests``, which lies beside its ``models``."""

import os
import shutil
import tempfile
import unittest

import numpy as np
from monai.bundle import ConfigWorkflow
from PIL import Image

ROOT = "models/fundus_disc_cup_segmentation"
QUICK = {"spatial_size": [64, 64], "instance_prompt#steps": 1}


class TestFundusDiscCupSegmentation(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        random = np.random.default_rng(0)
        for kind in ("images", "masks"):
            os.makedirs(os.path.join(self.folder, "sites", "site", kind))
        for number in range(4):
            photograph = random.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            mask = np.zeros((72, 80), dtype=np.uint8)
            mask[20:50, 20:50], mask[30:40, 30:40] = 1, 2
            for kind, values in (("images", photograph), ("masks", mask)):
                Image.fromarray(values).save(os.path.join(self.folder, "sites", "site", kind, f"eye_{number}.png"))

    def workflow(self, workflow_type, *configs, **settings):
        flow = ConfigWorkflow(
            workflow_type=workflow_type,
            config_file=[f"{ROOT}/configs/{name}.yaml" for name in configs],
            logging_file=f"{ROOT}/configs/logging.conf",
            meta_file=f"{ROOT}/configs/metadata.json",
            bundle_root=ROOT,
            output_dir=os.path.join(self.folder, "outputs"),
            **{"dataset_dir": os.path.join(self.folder, "sites"), **QUICK, **settings},
        )
        flow.initialize()
        return flow

    def written(self):
        return {name for _, _, names in os.walk(os.path.join(self.folder, "outputs")) for name in names}

    def test_inference(self):
        flow = self.workflow("infer", "inference", dataset_dir=os.path.join(self.folder, "sites", "site", "images"))
        assert not flow.check_properties()
        flow.run()
        flow.finalize()
        assert {f"eye_{number}.png" for number in range(4)} | {"records.jsonl"} <= self.written()

    def test_evaluate(self):
        flow = self.workflow("infer", "inference", "evaluate")
        flow.run()
        flow.finalize()
        assert "summary.json" in self.written()

    def test_train(self):
        flow = self.workflow("train", "inference", "train", max_epochs=1, val_interval=1)
        assert not flow.check_properties()
        flow.run()
        flow.finalize()
        assert "model.pt" in self.written()


if __name__ == "__main__":
    unittest.main()
