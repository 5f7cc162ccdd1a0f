"""Metrics in `metrics.jsonl`; texts in `samples.txt`; other media in `media/`."""

import time
from collections.abc import Mapping
from typing import Any

from jaxmodels.runs.going_back import later_media
from jaxmodels.runs.json_files import append_text
from jaxmodels.storage.paths import is_bucket
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib

BUCKET_SECONDS = 10.0  # for which lines wait at most before an object is written anew


class JsonLines(Callback):
    """Append metrics to `metrics.jsonl`, one object a line. In the training loop: a resumed run needs each line before its checkpoint.

    While the file cannot be written, lines wait in memory, in their order. An object in a bucket can only be written anew: lines wait for 10 seconds,
    or for the next evaluation, checkpoint or end.
    """

    name = "jsonl"
    background = False
    on_error = "continue"

    def __init__(self):
        self._waiting, self._failed, self._next = [], False, 0.0

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self._add(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        if values:  # empty where the data has no such split
            self._add(run, step, split, values)

    def _add(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        self._waiting.append((step, split, dict(values)))
        if not is_bucket(run.folder.path) or split != "train" or time.monotonic() >= self._next:
            self._write(run)

    def on_save(self, run: Any, step: int) -> None:
        if self._waiting:
            self._write(run)

    def _write(self, run: Any) -> None:
        try:
            if is_bucket(run.folder.path):
                run.folder.add_lines(self._waiting)
                self._waiting, self._next = [], time.monotonic() + BUCKET_SECONDS
            while self._waiting:
                run.folder.add_metrics(*self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not self._failed:
                self._failed = True
                run.warn(f"{run.folder.metrics_file} cannot be written ({error.strerror}): training goes on; its lines are kept, and written when it can be")
            return
        if self._failed:
            self._failed = False
            run.say(f"{run.folder.metrics_file} is written again, with all lines")

    def on_end(self, run: Any, result: Any) -> None:
        if self._waiting:
            self._write(run)
        if self._waiting:
            run.warn(f"{run.folder.metrics_file} lacks the last {len(self._waiting)} lines, from step {self._waiting[0][0]} on")


class MediaFiles(Callback):
    """Append texts to `samples.txt`; write images, figures and audio to `media/NAME_STEP.png` and `.wav`.

    Runs in the training loop, so that a file is there before the checkpoint that knows of its evaluation. `RunFolder.rewind` rewinds
    `samples.txt`; a file in `media/` is written again under the same name.
    """

    name = "media"
    background = False
    on_error = "continue"

    def on_start(self, run: Any) -> None:
        """Delete files of later steps, which an earlier start wrote after the checkpoint."""
        for path in later_media(run.folder, run.step):
            path.unlink()

    def on_media(self, run: Any, step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        if kind == "text":
            append_text(run.folder.samples_file, f"--- step {step} ---\n{media}\n\n")
            return
        for item in media_lib.encode(name, media, kind, **options):
            folder = run.folder.path / "media"
            folder.mkdir(exist_ok=True)
            (folder / item.filename(step)).write_bytes(item.content)
