"""Random access into files, also gzip (`.gz`) and Zstandard (`.zst`) files.

A compressed file can only be read from the start of a frame (in gzip, a member). While it is read once for its index, frames of up to 16 MiB are
recorded where they are. A larger frame is copied into the index in blocks of 256 KiB that are compressed one by one, which takes about as much disk as
the file. A block, or a small frame, is decompressed as a whole, into the cache of groups.
"""

import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxmodels.data import access
from jaxmodels.data.access import FileId, Files
from jaxmodels.data.groups import GroupCache
from jaxmodels.data.index import Index, Writer
from jaxmodels.errors import ConfigError, optional_import

SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
FRAME = 16 << 20  # bytes of the largest frame that is read in place
BLOCK = 256 << 10  # bytes of a copied block: 1 ms to decompress
_INPUT = 16 << 10  # compressed bytes decompressed at once; their contents may be 1,000 times as large


def codec_of(path: str) -> str | None:
    """Return the codec of a file by its name."""
    return next((codec for suffix, codec in SUFFIXES.items() if path.endswith(suffix)), None)


def _decompressor(codec: str) -> Any:
    """Return an object that decompresses one frame, with `decompress`, `eof` and `unused_data`."""
    if codec == "gzip":
        return zlib.decompressobj(31)
    return optional_import("zstandard", "zstd").ZstdDecompressor().decompressobj()


def _errors(codec: str) -> type[Exception]:
    return zlib.error if codec == "gzip" else optional_import("zstandard", "zstd").ZstdError


def _decompressed(path: str, codec: str, add: Callable[[int], None] = lambda size: None) -> Iterator[tuple[bytes, int | None]]:
    """Yield parts of a file's contents, and the offset in the file where a frame ends with them, or None.

    Raises:
      ConfigError: the file is damaged or truncated.
    """
    damage, frame, done = _errors(codec), None, 0
    for block in access.blocks(path):
        add(len(block))
        while block:
            if frame is None and not block.strip(b"\0"):
                break  # zeros after the last frame are padding, as gzip allows
            frame = frame or _decompressor(codec)
            part, block = block[:_INPUT], block[_INPUT:]
            try:
                content = frame.decompress(part)
            except damage as error:
                raise ConfigError(
                    f"{path}: the file is damaged: it cannot be decompressed after {done:,} of its bytes ({error}). Copy it again or leave it out."
                ) from error
            done += len(part)
            if not frame.eof:
                yield content, None
                continue
            block, done = frame.unused_data + block, done - len(frame.unused_data)
            yield content, done
            frame = None
        else:
            continue
        done += len(block)
    if frame is not None:
        raise ConfigError(f"{path}: the file is truncated: it ends after {done:,} bytes within compressed data. Copy it again or leave it out.")


def open_stream(path: str) -> io.BufferedReader:
    """Open a file, also a compressed or remote one, to read its contents from their start to their end. A copy on the disk is read in its place."""
    codec, path = codec_of(path), access.on_disk(path)
    return io.BufferedReader(Stream(access.blocks(path) if codec is None else (content for content, _ in _decompressed(path, codec))), 1 << 20)


class Stream(io.RawIOBase):
    """Parts of bytes as a file."""

    def __init__(self, parts: Iterable[bytes]):
        self._parts, self._rest = iter(parts), memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)  # slices of it are no copies
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class Recorder:
    """Reads files for an index: yields their contents, and records the frames and blocks of compressed ones."""

    def __init__(self, writer: Writer):
        self._writer = writer
        self.crc32 = 0  # of all contents so far
        self.block_ends: list[int] = []  # number of blocks up to the end of each file

    def contents(self, file: FileId) -> Iterator[bytes]:
        """Yield the contents of the next file."""
        codec = codec_of(file.path)
        for content in self._plain(file) if codec is None else self._frames(file.path, codec):
            self.crc32 = zlib.crc32(content, self.crc32)
            yield content
        self.block_ends.append(self._writer.size("block_start"))

    def _plain(self, file: FileId) -> Iterator[bytes]:
        for content in access.blocks(file.path):
            self._writer.progress.add(len(content))
            yield content

    def _frames(self, path: str, codec: str) -> Iterator[bytes]:
        """Yield the contents of a compressed file, and record its blocks."""
        held, copying = bytearray(), False  # what is decompressed of a frame and not recorded yet
        start, frame_start = 0, 0  # of what is held, decompressed; of the frame, compressed
        for content, frame_end in _decompressed(path, codec, self._writer.progress.add):
            yield content
            held += content
            copying = copying or len(held) > FRAME
            if copying:
                at = 0
                while len(held) - at >= BLOCK or (frame_end is not None and at < len(held)):
                    end = min(len(held), at + BLOCK)
                    end = held.rfind(b"\n", at, end) + 1 or end  # a row that spans two blocks would need both
                    self._copy(bytes(held[at:end]), start + at)
                    at = end
                del held[:at]
                start += at
            if frame_end is not None:
                if not copying and held:
                    self._record(start, frame_start, frame_end - frame_start, copied=False)
                    start += len(held)
                held, copying, frame_start = bytearray(), False, frame_end
        self._record(start, frame_start, 0, copied=False)  # the end of the contents

    def _copy(self, content: bytes, start: int) -> None:
        compressed = zlib.compress(content, 1)
        self._record(start, self._writer.size("copies"), len(compressed), copied=True)
        self._writer.append("copies", np.frombuffer(compressed, np.uint8), np.uint8)

    def _record(self, start: int, offset: int, length: int, copied: bool) -> None:
        for name, value in (("block_start", start), ("block_offset", offset), ("block_length", length), ("block_copied", copied)):
            self._writer.append(name, [value])


class Contents:
    """The decompressed contents of the files of an index, by range."""

    def __init__(self, index: Index, cache: GroupCache):
        self.index, self.cache, self.files = index, cache, Files(index.files)
        self.block_ends = index.header["block_ends"]

    @property
    def has_blocks(self) -> bool:
        """Whether any file is compressed."""
        return self.block_ends[-1] > 0

    def blocks(self, file: int) -> range:
        """Return the blocks of a file; the last one is empty, at the end of its contents."""
        return range(self.block_ends[file - 1] if file else 0, self.block_ends[file])

    def read(self, file: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file's contents."""
        blocks = self.blocks(file)
        if not blocks:
            return self.files.read(file, start, stop)
        starts = self.index["block_start"]
        block = blocks.start + int(np.searchsorted(starts[blocks.start : blocks.stop], start, side="right")) - 1
        parts = []
        while start < stop:
            begin = int(starts[block])
            content = self._block(file, block)
            parts.append(content[start - begin : stop - begin])
            start, block = begin + len(content), block + 1
        return b"".join(parts)

    def _block(self, file: int, block: int) -> bytes:
        offset, length = int(self.index["block_offset"][block]), int(self.index["block_length"][block])

        def decode():
            if self.index["block_copied"][block]:
                content = zlib.decompress(self.index["copies"][offset : offset + length].tobytes())
            else:
                codec = codec_of(self.files.path(file))
                content = _decompressor(codec).decompress(self.files.read(file, offset, offset + length))
            return content, len(content)

        return self.cache.get((str(self.index.folder), block), decode)
