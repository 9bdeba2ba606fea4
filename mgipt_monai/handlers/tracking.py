# SPDX-License-Identifier: Apache-2.0
"""A stream in MLflow: MONAI's handler, with what a stream's images give."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ignite.engine import Engine
from monai.handlers import MLFlowHandler, from_engine

from mgipt_monai.engines import AdaptationEvents
from mgipt_monai.handlers.evaluators import describe, wrap_run
from mgipt_monai.utils.provenance import versions

__all__ = ["StreamMLFlowHandler"]

LONGEST = 500
"""Characters of a parameter, as far as every MLflow takes them."""


class StreamMLFlowHandler(MLFlowHandler):
    """MONAI's ``MLFlowHandler`` for a :class:`mgipt_monai.StreamingAdaptationEvaluator`, one MLflow run for each run.

    It logs the method's settings and the versions as parameters, each image's figures as metrics with the number of the
    image as their step, the number of ``failed_images``, at the end the means over all images as ``all_dsc`` and so on,
    and files as artifacts. It logs no image's name. A run that ends by an error is marked as failed. Attach it after
    the adaptation handler, in the first process only.

    Args:
        tracking_uri: of a server or a database, such as ``sqlite:///mlruns.db``; None takes MONAI's default.
        experiment_name: groups runs in MLflow.
        run_name: name of the run; None is the time of its start.
        experiment_param: further parameters.
        artifacts: files or folders to log at the end; those that are not there are left out.
        kwargs: as for ``MLFlowHandler``.

    Raises:
        OptionalImportError: if mlflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str = "mgipt",
        run_name: str | None = None,
        experiment_param: Mapping[str, Any] | None = None,
        artifacts: Any = None,
        **kwargs: Any,
    ) -> None:
        self._own_params, self._has_own_name = dict(experiment_param or {}), run_name is not None
        options = {"output_transform": from_engine("figures", first=True), "close_on_complete": True, **kwargs}
        super().__init__(
            tracking_uri=tracking_uri,
            experiment_name=experiment_name,
            run_name=run_name,
            artifacts=artifacts,
            epoch_logger=self._log_all,
            **options,
        )

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        super().attach(engine)
        engine.register_events(*AdaptationEvents)
        engine.add_event_handler(AdaptationEvents.IMAGE_FAILED, self._count_failed)
        wrap_run(engine, self._running)

    def start(self, engine: Engine) -> None:
        """Begin an MLflow run of its own, with what the stream is as its parameters."""
        if not self._has_own_name:
            # without a name MONAI goes on with a run that was never ended
            self.run_name = f"run_{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 10**6:06d}"
        method = getattr(engine.inferer, "method", None)  # type: ignore[attr-defined] # of MONAI's evaluators
        settings = {} if method is None else describe(method=method.settings())
        found = {**settings, **describe(versions=versions()), **self._own_params}
        self.experiment_param = {key: str(value)[:LONGEST] for key, value in found.items()}
        super().start(engine)

    def _count_failed(self, engine: Engine) -> None:
        failed = len(engine.state.summary.failures)  # type: ignore[attr-defined] # of streaming evaluators
        self._log_metrics({"failed_images": failed}, step=engine.state.iteration)

    def _log_all(self, engine: Engine) -> None:
        figures = {f"all_{name}": value for name, value in engine.state.metrics.items()}
        summary = getattr(engine.state, "summary", None)
        if summary is not None:
            failed = len(summary.failures)
            figures |= {"all_images": len(summary) - failed, "failed_images": failed}
        self._log_metrics(figures, step=engine.state.iteration)

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.cur_run is not None:
                finished, self.run_finish_status = self.run_finish_status, "FAILED"
                self.close()
                self.run_finish_status = finished
            raise
