# SPDX-License-Identifier: Apache-2.0
"""Measures source statistics in an existing pipeline, with its loader, weights and inferer."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from torch import Tensor
from tqdm import tqdm

from mgipt_monai.handlers.evaluators import check_evaluator
from mgipt_monai.networks.alignment.source_statistics import measure_source_statistics

__all__ = ["SourceStatisticsHandler"]


class SourceStatisticsHandler:
    """Measures source statistics with the loader, network and inferer of a ``SupervisedEvaluator``, instead of its run.

    When the evaluator starts, and the handlers attached earlier have run (a ``CheckpointLoader`` loads the weights),
    its network runs over its images through its inferer. The handler then writes the file and ends the run. Nothing
    else is predicted, postprocessed or saved.

    Args:
        path: the statistics file to write, see :func:`mgipt_monai.measure_source_statistics`.
        windows: maximum number of sliding windows per image to measure in; use the same number as in adaptation.
        layers: regular expression on the names of the layers to measure; None measures all.

    Example:
        >>> import tempfile, torch
        >>> from monai.engines import SupervisedEvaluator
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.InstanceNorm2d(4))
        >>> evaluator = SupervisedEvaluator("cpu", [{"image": torch.rand(1, 1, 16, 16)}], network=network)
        >>> path = os.path.join(tempfile.mkdtemp(), "source_statistics.pt")
        >>> SourceStatisticsHandler(path).attach(evaluator)
        >>> evaluator.run()
        >>> os.path.exists(path)
        True
    """

    def __init__(self, path: str | os.PathLike, windows: int = 2, layers: str | None = None) -> None:
        self.path, self.windows, self.layers = path, windows, layers

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, after the handler that loads its weights.

        Raises:
            TypeError: for an engine that is not a ``SupervisedEvaluator``.
        """
        check_evaluator(type(self).__name__, engine)
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: SupervisedEvaluator) -> None:
        """Measure, write the file and end the run."""
        statistics = measure_source_statistics(
            engine.network, _images(engine), self.layers, engine.state.device, engine.inferer, self.windows
        )
        statistics.save(self.path)
        engine.terminate()


def _images(engine: SupervisedEvaluator) -> Iterator[Tensor]:
    """Yield the evaluator's images as it would pass them to its network."""
    for batch in tqdm(engine.data_loader, desc="source images"):
        yield engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)[0]
