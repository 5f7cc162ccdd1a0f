"""MLflow: metrics, config, parents and media of a run, in a local store or on a tracking server."""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.errors import optional_import
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib
from jaxmodels.training.trackers.wandb import parents

_RUN_TAG = "jaxmodels.run"
_BATCH = 100  # params in one request, at most; metrics may be more


class Mlflow(Callback):
    """Write to one MLflow run: config as params, parents as a tag, media as artifacts.

    The run is found by its tag `jaxmodels.run`, the id in the manifest, so every start of a run continues the same MLflow run. After a
    resume, lines since the checkpoint are logged again, with the same values at the same steps.
    """

    def __init__(self, *, tracking_uri: str | None = None, experiment: str = "jaxmodels", run_name: str | None = None):
        """
        Args:
          tracking_uri: of a server or database. A SQLite file, RUN/mlruns/mlflow.db, if None: MLflow no longer supports plain files.
          experiment: name of the MLflow experiment.
          run_name: shown by MLflow; the name of the run folder if None.

        Raises:
          ConfigError: MLflow is not installed, or for the SQLite file, SQLAlchemy.
        """
        optional_import("mlflow.tracking", "mlflow")
        if tracking_uri is None or "sql" in tracking_uri.partition(":")[0]:
            optional_import("sqlalchemy", "mlflow")
            optional_import("alembic", "mlflow")
        self._tracking_uri, self._experiment, self._run_name = tracking_uri, experiment, run_name
        self._client = self._id = None

    def on_start(self, run: Any) -> None:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # what it prints would break the live line of the terminal
        folder, uri, artifacts = run.folder.path / "mlruns", self._tracking_uri, None
        if uri is None:
            folder.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment_id(artifacts)
        manifest = run.folder.manifest()
        found = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{manifest['id']}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = self._run_name or run.folder.path.name
            self._id = self._client.create_run(experiment, tags={_RUN_TAG: manifest["id"]}, run_name=name).info.run_id
        self._client.set_tag(self._id, "parents", json.dumps(parents(manifest)))
        self._log_config(run.experiment.config, found[0].data.params if found else {})
        run.record({"mlflow": {"id": self._id, "tracking_uri": uri}})

    def _experiment_id(self, artifacts: str | None) -> str:
        """Return the id of the experiment, created if there is none."""
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(self._experiment)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(self._experiment, artifact_location=artifacts)
        except MlflowException:
            if (found := self._client.get_experiment_by_name(self._experiment)) is None:
                raise
            return found.experiment_id  # another run created it in between

    def _log_config(self, config: Mapping[str, Any], logged: Mapping[str, str]) -> None:
        """Log the config's leaves as params. MLflow's params never change, so a key that a resume changed becomes a tag, `resumed.KEY`."""
        from mlflow.entities import Param

        values = {key: str(value)[:6000] for key, value in config_lib.flatten(config).items()}
        for some in _batches([Param(key, value) for key, value in values.items() if key not in logged]):
            self._client.log_batch(self._id, params=some)
        for key, value in values.items():
            if key in logged and logged[key] != value:
                self._client.set_tag(self._id, f"resumed.{key}", value)

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self.on_evaluate(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for some in _batches([Metric(_allowed(f"{split}/{name}"), value, now, step) for name, value in values.items()]):
            self._client.log_batch(self._id, metrics=some)

    def on_media(self, run: Any, step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        if kind == "text":
            self._client.log_text(self._id, media, f"media/{_allowed(name).replace('/', '_')}_{step}.txt")
            return
        with TemporaryDirectory() as folder:
            for item in media_lib.encode(name, media, kind, **options):
                path = Path(folder) / item.filename(step)
                path.write_bytes(item.content)
                self._client.log_artifact(self._id, str(path), "media")

    def on_end(self, run: Any, result: Any) -> None:
        self._client.set_terminated(self._id, "FINISHED" if result is not None else "KILLED")


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[i : i + _BATCH] for i in range(0, len(items), _BATCH)]


def _allowed(name: str) -> str:
    """Replace characters that MLflow does not allow in names."""
    return re.sub(r"[^\w./ -]", "_", name)
