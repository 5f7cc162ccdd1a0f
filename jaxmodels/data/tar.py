"""The members of a tar file."""

import tarfile
from collections.abc import Iterator

from jaxmodels.data import access
from jaxmodels.data.index import Progress
from jaxmodels.errors import ConfigError

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}


def members(path: str, progress: Progress) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each regular file in a tar file.

    Raises:
      ConfigError: the file is compressed, damaged or truncated.
    """
    with access.open_file(path) as file:
        start = file.read(8)
        tool = next((tool for magic, tool in _COMPRESSED.items() if start.startswith(magic)), None)
        if tool is not None:
            raise ConfigError(
                f"{path}: a compressed tar file cannot be read from its middle; decompress it first: {tool} {path}. JPEG, PNG and FLAC are compact already."
            )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    progress.add(tar.offset - member.offset)
                    tar.members.clear()  # it would hold all members
                    if member.issparse():
                        raise tarfile.TarError(f"{member.name} is stored as a sparse file, which cannot be read in one piece")
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ConfigError(f"{path}: the file is damaged or truncated: {error}. Copy it again or leave it out.") from error
        # tarfile takes a damaged or missing header for the end, which is a block of zeros.
        file.seek(end)
        header = file.read(tarfile.BLOCKSIZE)
    if len(header) < tarfile.BLOCKSIZE:
        raise ConfigError(
            f"{path}: the file is truncated: it ends after {end + len(header):,} bytes, before the end mark of a tar file. Copy it again or leave it out."
        )
    if header.strip(b"\0"):
        raise ConfigError(f"{path}: the file is damaged: byte {end:,} is no header of a tar file. Copy it again or leave it out.")
