"""Weights & Biases: metrics, config, parents and media of a run, online or offline."""

import contextlib
import html
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib


class Wandb(Callback):
    """Write to one W&B run. Its id is the id in the manifest, so every start of a run resumes the same W&B run.

    Charts have the run's own steps on their axis (`step`), not W&B's: W&B drops lines whose step is not the latest, such as the test of an
    earlier, best checkpoint. After a resume, lines since the checkpoint are logged again, with the same values at the same steps.
    """

    def __init__(
        self,
        *,
        project: str = "jaxmodels",
        entity: str | None = None,
        run_name: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline"] | None = None,
    ):
        """
        Args:
          project: of W&B.
          entity: a user or team; the user's default if None.
          run_name: shown by W&B; the name of the run folder if None.
          group: of runs.
          tags: of the run.
          mode: `offline` writes to RUN/wandb only, for `wandb sync`. WANDB_MODE decides if None.

        Raises:
          ConfigError: wandb is not installed, or has no API key for online mode. It would ask for one on the terminal later.
        """
        self._wandb = optional_import("wandb", "wandb")
        if (mode or self._wandb.setup().settings.mode) == "online" and not self._wandb.login(prompt=False, verify=False):
            raise ConfigError("tracker 'wandb' has no API key: run `wandb login`, set WANDB_API_KEY, or set its mode='offline'.")
        self._options = {"project": project, "entity": entity, "group": group, "tags": tags or None, "mode": mode}
        self._run_name = run_name
        self._run = None

    def on_start(self, run: Any) -> None:
        manifest = run.folder.manifest()
        settings = self._wandb.Settings(
            silent=True,  # what it prints would break the live line of the terminal
            console="off",  # and the terminal is not W&B's to record
        )
        self._run = self._wandb.init(
            id=manifest["id"],
            resume="allow",
            dir=str(run.folder.path),
            name=self._run_name or run.folder.path.name,
            settings=settings,
            **self._options,
        )
        config = dict(run.experiment.config) | {"parents": parents(manifest)}
        self._run.config.update(config, allow_val_change=True)  # on a resume keys of the machine may differ
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        url = None if self._run.offline else self._run.url
        run.record({"wandb": {"id": self._run.id, "project": self._run.project, "url": url}})
        run.say(f"W&B: {url or f'offline; upload with: wandb sync {Path(self._run.dir).parent}'}")

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self.on_evaluate(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in values.items()} | {"step": step})

    def on_media(self, run: Any, step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        if kind == "text":
            self._run.log({name: self._wandb.Html(f"<pre>{html.escape(media)}</pre>"), "step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            shown = {item.name: self._show(item, Path(folder)) for item in media_lib.encode(name, media, kind, **options)}
            self._run.log(shown | {"step": step})

    def _show(self, item: media_lib.MediaFile, folder: Path) -> Any:
        """Return W&B's object for an image or a clip. A clip passes through a file: W&B needs one more package for arrays and for lists."""
        if item.suffix == ".png":
            return self._wandb.Image(Image.open(io.BytesIO(item.content)))
        path = folder / f"{item.name.replace('/', '_')}.wav"
        path.write_bytes(item.content)
        return self._wandb.Audio(str(path))

    def on_end(self, run: Any, result: Any) -> None:
        self._run.finish(exit_code=0 if result is not None else 1)

    def abandon(self) -> None:
        """Kill W&B's service process, for which its hook at exit would wait as long as the server is silent. What it has received is on disk.

        W&B has no public way to do this. The attributes are the same in all versions that the extra `wandb` allows.
        """
        process = self._wandb.setup().assert_service()._proc
        if process is not None:  # None: a service that W&B did not start
            process._process.kill()
            # This removes the hook. Then it fails to notify the service; or, if the connection is not closed yet, it ends the program with the service's
            # status, which is -9.
            with contextlib.suppress(ConnectionError, SystemExit):
                self._wandb.teardown()


def parents(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the run, id and step of each ancestor whose weights a run started from."""
    return [{key: parent[key] for key in ("run", "id", "step") if key in parent} for parent in manifest.get("parents", [])]
