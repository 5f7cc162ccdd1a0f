"""A TensorBoard event file: records of a length, its checksum, the event, and its checksum."""

import os
import socket
import struct
import time
from pathlib import Path

_APPEND_BELOW = 1 << 18  # bytes; checking the checksums of so much takes 0.1 s


class EventFile:
    """The event file that a start writes.

    A start appends to the last file of the folder if that is small, so that a run that is stopped a thousand times does not have a thousand
    files. What a killed process or a crash left unfinished at its end is cut off: TensorBoard would read no further.
    """

    def __init__(self, folder: Path):
        """folder: of the event files; created if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        last = max(folder.glob("events.out.tfevents.*"), default=None)  # TensorBoard reads files in the order of their names, too
        end = _whole(last) if last is not None and last.stat().st_size < _APPEND_BELOW else 0
        self.is_new = last is None or not end
        if last is None or not end:
            last = folder / f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(last, "wb" if self.is_new else "r+b")
        self._file.seek(end)
        self._file.truncate()

    def write(self, event: bytes) -> None:
        """Write a serialised event."""
        from tensorboardX.record_writer import masked_crc32c

        length = struct.pack("<Q", len(event))
        self._file.write(length + struct.pack("<I", masked_crc32c(length)) + event + struct.pack("<I", masked_crc32c(event)))

    def flush(self) -> None:
        """Write what is buffered to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole(path: Path) -> int:
    """Return the number of bytes of the whole records at the beginning of a file."""
    from tensorboardX.record_writer import masked_crc32c

    content, end = path.read_bytes(), 0
    while len(content) >= end + 16:
        length, check = struct.unpack_from("<QI", content, end)
        after = end + 12 + length
        if check != masked_crc32c(content[end : end + 8]) or len(content) < after + 4:
            break
        if struct.unpack_from("<I", content, after)[0] != masked_crc32c(content[end + 12 : after]):
            break
        end = after + 4
    return end
