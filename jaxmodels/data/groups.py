"""Groups of rows that can only be decoded together, such as Parquet's row groups, in a cache of bounded size."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jaxmodels.data.keys import Keys
from jaxmodels.errors import ConfigError

_AT_ONCE = 4  # groups decoded at the same time, beside those in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupKeys(Keys):
    """Keys of sources whose rows are decoded in groups.

    Attributes:
      group_cache_mb: MiB of decoded row groups or blocks that a process holds, over all splits; up to four more are being decoded.
    """

    group_cache_mb: float = 256.0

    def __post_init__(self):
        if not self.group_cache_mb >= 0:
            raise ConfigError(f"config.data.group_cache_mb must be at least 0, got {self.group_cache_mb}.")

    def cache(self) -> "GroupCache":
        return GroupCache(int(self.group_cache_mb * 2**20))


class GroupCache:
    """Decoded groups, least recently used ones dropped. Threads that want the same group wait for one of them to decode it.

    It holds at most `limit` bytes; `_AT_ONCE` groups more are being decoded, or are used by a thread. A worker process has its own.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._groups: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._busy: dict[Any, threading.Lock] = {}
        self._decoding = threading.BoundedSemaphore(_AT_ONCE)

    def __getstate__(self):
        return self.limit

    def __setstate__(self, limit):
        self.__init__(limit)

    def get(self, key: Any, decode: Callable[[], tuple[Any, int]]) -> Any:
        """Return a group; `decode` returns it and its bytes."""
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key][0]
            own = self._busy.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._groups:  # another thread has decoded it
                    self._groups.move_to_end(key)
                    return self._groups[key][0]
            try:
                with self._decoding:
                    group, size = decode()
                    with self._lock:
                        self._store(key, group, size)
            finally:
                with self._lock:
                    self._busy.pop(key, None)
        return group

    def _store(self, key: Any, group: Any, size: int) -> None:
        if size > self.limit:
            return
        while self._size + size > self.limit:
            self._size -= self._groups.popitem(last=False)[1][1]
        self._groups[key] = group, size
        self._size += size
