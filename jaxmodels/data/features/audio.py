"""Audio."""

import dataclasses
import wave
from collections.abc import Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np

from jaxmodels.data.features.base import Column, Feature, Problem
from jaxmodels.data.features.image import opened
from jaxmodels.data.reading import is_unavailable
from jaxmodels.errors import ConfigError, optional_import

_TYPES = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}  # by bytes of a sample


@dataclasses.dataclass(kw_only=True)
class Audio(Feature):
    """A file of PCM WAV or FLAC: `audio` float32 [S] in [-1, 1), padded with zeros, and `audio_length` int32, the samples that are not padding.

    Channels are averaged. Decoded on reading; FLAC by the package soundfile. A value is a path or the bytes of a file.

    Attributes:
      audio_column: the bytes of a WAV or FLAC file, or its path relative to the folder of the file of rows.
      samples: samples of an example, S; longer files are cut.
      sample_rate: samples a second, in Hz; a file of another rate is a bad example.
    """

    arrays: ClassVar = ("audio", "audio_length")
    on_read: ClassVar = True
    audio_column: Column | None = None
    samples: int | None = None
    sample_rate: int | None = None

    def __post_init__(self):
        if self.samples is None or self.sample_rate is None or min(self.samples, self.sample_rate) < 1:
            raise ConfigError(f"config.data: audio needs samples and sample_rate, both at least 1; got {self.samples} and {self.sample_rate}.")

    def columns(self):
        return {"audio_column": self.audio_column}

    def encode(self, row):
        try:
            with opened(row.values[self.audio_column], row) as file:
                start = file.read(4)
                file.seek(0)
                rate, mono = _read_flac(file, self.samples) if start == b"fLaC" else _read_wav(file, self.samples)
        except (MemoryError, Problem, ConfigError):
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the file is broken
            if is_unavailable(error):
                raise
            raise Problem(f"cannot be decoded as WAV or FLAC audio: {str(error) or 'the file ends early'}.") from error
        if rate != self.sample_rate:
            raise Problem(f"the sample rate is {rate} Hz, not data.sample_rate={self.sample_rate}; resample the file.")
        result = self.blank()
        result["audio"][: len(mono)] = mono
        return result | {"audio_length": np.int32(len(mono))}

    def blank(self):
        return {"audio": np.zeros(self.samples, np.float32), "audio_length": np.int32(0)}

    def info(self):
        return {"samples": self.samples, "sample_rate": self.sample_rate}

    @staticmethod
    def describe(columns: Mapping[str, np.ndarray], info: Mapping) -> dict[str, Any]:
        seconds = columns["audio_length"] / info["sample_rate"] if "sample_rate" in info else columns["audio_length"]
        return {"audio": {"least": float(seconds.min()), "mean": float(seconds.mean()), "most": float(seconds.max())}}

    @staticmethod
    def show(name, example, info):
        if name == "audio_length":
            return None
        length, audio = int(example["audio_length"]), np.asarray(example["audio"])
        seconds = f"{length / info['sample_rate']:.3g} s" if "sample_rate" in info else f"{length} samples"
        return f"{seconds}, peak {np.abs(audio).max():.3g}"


def _read_wav(file: BinaryIO, samples: int) -> tuple[int, np.ndarray]:
    """Return the sample rate and the first samples of PCM audio, averaged over channels, float64 [S] in [-1, 1)."""
    with wave.open(file) as sound:
        rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
        content = sound.readframes(samples)
    if width not in _TYPES:
        raise Problem(f"samples have {8 * width} bits; 8, 16 and 32 can be read.")
    content = content[: len(content) // (width * channels) * width * channels]  # a truncated file may end within a sample
    mono = np.frombuffer(content, _TYPES[width]).reshape(-1, channels).mean(1)
    scale = 2.0 ** (8 * width - 1)
    return rate, (mono - scale if width == 1 else mono) / scale  # 8-bit samples are unsigned


def _read_flac(file: BinaryIO, samples: int) -> tuple[int, np.ndarray]:
    """As `_read_wav`, for FLAC."""
    with optional_import("soundfile", "audio").SoundFile(file) as sound:
        return sound.samplerate, sound.read(samples, always_2d=True).mean(1)
