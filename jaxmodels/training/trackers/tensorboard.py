"""Event files that TensorBoard reads, written without TensorFlow."""

import contextlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib
from jaxmodels.training.trackers.event_file import EventFile


class TensorBoard(Callback):
    """Write event files to `tensorboard/`.

    Events go to the file in the calling thread, and not through tensorboardX's `SummaryWriter`: the thread of that dies without a word on a
    full disk, and its next `add_scalar` blocks for ever.
    """

    def __init__(self):
        # The import is here, not in the tracker's thread, because _without changes a table of the whole process.
        # tensorboardX would import these where they are installed, for two seconds and for 0.3 s, and not use them.
        with _without("torch", "boto3", "google.cloud.storage"):
            import tensorboardX.summary  # noqa: F401
        self._file = None

    def on_start(self, run: Any) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file = EventFile(run.folder.tensorboard)
        if self._file.is_new:
            self._add(0, file_version="brain.Event:2")
        # TensorBoard hides what an earlier start wrote from this step on: it is written again.
        self._add(run.step + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self.on_evaluate(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(tag=_tag(f"{split}/{name}"), simple_value=value) for name, value in values.items()]))
        self._file.flush()

    def on_media(self, run: Any, step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        if kind == "text":
            self._add(step, summary=summary.text(_tag(name), media))
        else:
            for item in media_lib.encode(name, media, kind, **options):
                self._add(step, summary=Summary(value=[Summary.Value(tag=_tag(item.name), **_content(Summary, item))]))
        self._file.flush()

    def on_end(self, run: Any, result: Any) -> None:
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


def _content(summary: Any, item: media_lib.MediaFile) -> dict[str, Any]:
    """Return the field of a `Summary.Value` for an encoded image or clip."""
    if item.suffix == ".png":
        height, width, channels = item.shape
        return {"image": summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=item.content)}
    audio = summary.Audio(sample_rate=item.rate, num_channels=1, length_frames=item.shape[0], encoded_audio_string=item.content, content_type="audio/wav")
    return {"audio": audio}


def _tag(name: str) -> str:
    return re.sub(r"[^-/\w.]", "_", name)


@contextlib.contextmanager
def _without(*modules: str):
    """Make modules look as if they were not installed, unless they are imported already."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]
