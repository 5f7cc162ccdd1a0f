"""The file of a run folder's lock: the owner that it names, and the operations on it that no two processes can both win.

Everything relies on two operations that are atomic on local disks and on NFS: a hard link to a name fails if the name exists, and a rename
replaces a file. flock and fcntl locks are not used: many network file systems do not pass them on to other machines. Who takes a lock over first
creates a claim, a file named after the token of the lock that is replaced. Only one can create it, and only its creator may replace or remove
that lock. Tokens are never used again, so a slow process cannot take over from an owner that it has not seen.
"""

import dataclasses
import errno
import json
import os
import re
import socket
import uuid
import zlib
from pathlib import Path

from jaxmodels.runs.folder import now

_SIZE = 4096  # bytes; the file is overwritten in place, so its size must not change
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)  # file systems without hard links

own_tokens: set[str] = set()  # of the locks that this process holds or is about to


@dataclasses.dataclass(frozen=True)
class Owner:
    """The contents of a lock file.

    Attributes:
      token: identifies this lock; never used again.
      host: name of the machine.
      boot, pid_namespace: identify the start of the machine and the container, so that equal process numbers are of the same process.
      pid: number of the process.
      started: start time of the process, in the kernel's ticks; None where it cannot be read.
      since: time when the lock was taken, ISO 8601.
      path: the run folder as the owner knows it.
      stopping: name of the signal after which the owner saves and ends; None before.
    """

    token: str
    host: str = ""
    boot: str | None = None
    pid_namespace: str | None = None
    pid: int = 0
    started: int | None = None
    since: str = ""
    path: str = ""
    stopping: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process (the lock file cannot be read)"

    def encode(self, beat: int) -> bytes:
        """Return the contents of the lock file, padded to a fixed size."""
        return json.dumps(dataclasses.asdict(self) | {"beat": beat}).encode().ljust(_SIZE - 1) + b"\n"

    @staticmethod
    def decode(content: bytes) -> "Owner":
        """Return the owner that a lock file names; one without a process if the file is damaged, or not written yet."""
        try:
            values = json.loads(content)
            values.pop("beat", None)
            owner = Owner(**values)
            if isinstance(owner.token, str) and re.fullmatch(r"\w{1,64}", owner.token) and isinstance(owner.pid, int) and 0 <= owner.pid < 1 << 31:
                return owner
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        return Owner(f"unreadable{zlib.crc32(content):08x}")


def this_process(path: Path) -> Owner:
    """Return an owner that names this process, with a new token."""
    host, boot, namespace = _machine()
    return Owner(uuid.uuid4().hex, host, boot, namespace, os.getpid(), _start_time(os.getpid()), now(), str(path))


def _machine() -> tuple[str, str | None, str | None]:
    """Return what identifies the machine and the container. The host name does not suffice: containers may share it but not their processes."""
    boot = namespace = None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        pass  # no Linux
    return socket.gethostname(), boot, namespace


def _start_time(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; 0 if it has ended and only waits for its parent; None if that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # the name before may contain anything
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def is_alive(owner: Owner, path: Path) -> bool | None:
    """Return whether the owner of the lock on the folder `path` is alive; None if only its heartbeat can show that.

    That is so on another machine, in another container, and if the folder has another path here: it may be a copy of the owner's.
    """
    if owner.pid <= 0 or (owner.host, owner.boot, owner.pid_namespace) != _machine():
        return None
    if owner.pid == os.getpid() and owner.started == _start_time(owner.pid):
        if owner.token not in own_tokens:
            return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # the process of another user
    started = _start_time(owner.pid)
    if started is None or owner.started is None:
        return None
    if started != owner.started:
        return False
    return True if owner.path == str(path) else None


class LockFile:
    """The file of a lock on a disk, and its operations. `bucket_lock.BucketLock` has the same ones."""

    def __init__(self, path: Path, token: str):
        """
        Args:
          path: of the file.
          token: of the owner that this process writes.
        """
        self.path, self._token, self._descriptor = path, token, -1

    def read(self) -> list[bytes]:
        """Return the contents of the lock and of the claims on it, the last of which decides; empty if there is no lock."""
        chain: list[bytes] = []
        content = _read(self.path)
        while content is not None:
            chain.append(content)
            content = _read(self._next_claim(chain))
        return chain

    def create(self, content: bytes) -> bool:
        """Create the lock; return False if there is one."""
        if _read(self.path) is not None:
            return False
        descriptor = self._create(self.path, content)
        if descriptor is None:
            return False
        self._own(descriptor)
        return True

    def replace(self, content: bytes, seen: list[bytes]) -> bool:
        """Replace another's lock; return False if it is not any more as it was `seen`."""
        claim = self._next_claim(seen)
        descriptor = self._create(claim, content)
        if descriptor is None:
            return False
        os.close(descriptor)
        try:
            if self.read()[:-1] != seen:
                return False
            temporary, descriptor = self._temporary(content)
            try:
                os.replace(temporary, self.path)
            except OSError:
                os.close(descriptor)
                raise
            self._own(descriptor)
            return True
        except FileNotFoundError:
            return False  # a new owner has cleared up
        finally:
            claim.unlink(missing_ok=True)

    def beat(self, content: bytes) -> bool:
        """Overwrite the lock of this process; return False if it is not this process's any more."""
        found = _read(self.path)
        if found is None:  # deleted by hand
            return self.create(content)
        if Owner.decode(found).token != self._token:
            return False
        # Into the file that was opened when it was this process's: a lock that replaced it meanwhile has another file.
        try:
            os.pwrite(self._descriptor, content, 0)
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_RDWR)  # an NFS server that was away; the next heartbeat looks whose file this is
        return True

    def remove(self, content: bytes) -> None:
        """Remove the lock of this process, unless another has taken it over or is about to."""
        os.close(self._descriptor)
        self._descriptor = -1
        claim = self._claim(self._token)
        try:
            descriptor = self._create(claim, content)
        except OSError:  # a full disk, which must not keep the next start waiting
            descriptor = os.open(os.devnull, os.O_RDONLY)
        if descriptor is not None:
            os.close(descriptor)
            found = _read(self.path)
            if found is not None and Owner.decode(found).token == self._token:
                self.path.unlink()
            claim.unlink(missing_ok=True)

    def owner(self) -> Owner | None:
        """Return the owner that the file names; None without a file."""
        content = _read(self.path)
        return None if content is None else Owner.decode(content)

    def _own(self, descriptor: int) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        # What killed processes left. A process that is still at work with such a file finds this lock, or that its file is gone, and tries again.
        for path in self.path.parent.glob(f"{self.path.stem}-*"):
            if path.suffix in (".claim", ".tmp") and path != self._claim(self._token):
                path.unlink(missing_ok=True)

    def _claim(self, token: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{token}.claim")

    def _next_claim(self, chain: list[bytes]) -> Path:
        """Return the claim on the last of a lock and its claims.

        An owner claims its own lock to remove it. If it is killed before that, the claim has the token of the lock, and is claimed in turn.
        """
        tokens: list[str] = []
        for content in chain:
            token = Owner.decode(content).token
            while token in tokens:
                token += "_"
            tokens.append(token)
        return self._claim(tokens[-1])

    def _temporary(self, content: bytes) -> tuple[Path, int]:
        path = self.path.with_name(f"{self.path.stem}-{uuid.uuid4().hex}.tmp")
        return path, _write_new(path, content)

    def _create(self, path: Path, content: bytes) -> int | None:
        """Create a file with its contents in one step; return a descriptor of it, None if it exists."""
        temporary, descriptor = self._temporary(content)
        try:
            os.link(temporary, path)
            return descriptor
        except OSError as error:
            if _read(path) == content:
                return descriptor  # the link was made, but the answer of the server was lost, and the request was repeated
            os.close(descriptor)
            if error.errno not in _NO_LINKS:
                if isinstance(error, (FileExistsError, FileNotFoundError)):
                    return None
                raise
        finally:
            temporary.unlink(missing_ok=True)
        try:
            return _write_new(path, content)
        except FileExistsError:
            return None


def _read(path: Path) -> bytes | None:
    """Return the contents of a file, None if there is none. Opening it anew makes NFS ask the server."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write_new(path: Path, content: bytes) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor
