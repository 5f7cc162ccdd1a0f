"""Who may ask, and how often: API keys, compared in constant time, and the rate limit of each."""

import dataclasses
import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from pathlib import Path

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from jaxmodels.errors import ConfigError
from jaxmodels.serving.errors import ApiError

VARIABLE = "JAXMODELS_API_KEYS"
_SHORTEST = 16  # characters of a key


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who asks: the name of a key, or the address of a client where there are no keys; and the rate limit, if there is one."""

    name: str
    rate: RateLimitItem | None


@dataclasses.dataclass(frozen=True)
class _Key:
    digest: bytes
    caller: Caller


class Access:
    """The keys and rate limits of a service."""

    def __init__(self, keys: str | None = None, rate_limit: str | None = None, *, environment: Mapping[str, str] | None = None):
        """
        Args:
          keys: file with a key in each line, which may be followed by a name and by a rate limit of its own: `KEY NAME 100/minute`. Keys are also read
            from the environment variable JAXMODELS_API_KEYS, separated by commas. Without any, everybody may ask.
          rate_limit: of each key, or of each address without keys: `60/minute`, `1000/hour`; None for no limit.
          environment: of the process, by default.

        Raises:
          ConfigError: the file cannot be read or has no key; a key is short, or there twice; a rate limit is none.
        """
        self._rate = None if rate_limit is None else _rate(rate_limit, "--rate_limit")
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._keys: list[_Key] = []
        listed = (os.environ if environment is None else environment).get(VARIABLE, "")
        for number, key in enumerate(filter(None, (key.strip() for key in listed.split(","))), 1):
            self._add(key, f"{VARIABLE}-{number}", self._rate, VARIABLE)
        if keys is not None:
            self._read(Path(keys))

    def _read(self, file: Path) -> None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api_keys={file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        before = len(self._keys)
        for number, line in enumerate(lines, 1):
            parts = line.split("#")[0].split(maxsplit=2)
            if parts:
                rate = _rate(parts[2], f"{file}, line {number}") if len(parts) > 2 else self._rate
                self._add(parts[0], parts[1] if len(parts) > 1 else f"key-{number}", rate, f"{file}, line {number}")
        if len(self._keys) == before:
            raise ConfigError(f"--api_keys={file} has no key. Write one in each line: KEY [NAME [RATE]].")

    def _add(self, key: str, name: str, rate: RateLimitItem | None, where: str) -> None:
        if len(key) < _SHORTEST:
            raise ConfigError(
                f"{where}: a key has {len(key)} characters, where {_SHORTEST} are the least: python -c 'import secrets; print(secrets.token_hex())'"
            )
        digest = _digest(key)
        if any(digest == other.digest for other in self._keys):
            raise ConfigError(f"{where}: the key of {name!r} is there twice.")
        self._keys.append(_Key(digest, Caller(name, rate)))

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    def caller(self, authorization: str | None, address: str) -> Caller:
        """Return who asks.

        Args:
          authorization: the header of this name.
          address: of the client.

        Raises:
          ApiError: 401, a key is needed, and none or a wrong one is given.
        """
        if not self._keys:
            return Caller(address, self._rate)
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorised("an API key is needed: send the header Authorization: Bearer KEY.")
        digest, found = _digest(given.strip()), None
        for key in self._keys:  # all are compared, so that the time does not tell which is near
            if hmac.compare_digest(digest, key.digest):
                found = key.caller
        if found is None:
            raise _unauthorised("the API key is not one of this service.")
        return found

    def count(self, caller: Caller) -> None:
        """Count a request of a caller; ApiError 429 if it has made too many."""
        if caller.rate is None or self._limiter.hit(caller.rate, caller.name):
            return
        reset = self._limiter.get_window_stats(caller.rate, caller.name).reset_time
        wait = max(1, int(reset - time.time()) + 1)
        raise ApiError(429, f"{caller.name} may ask {caller.rate}; try again in {wait} s.", code="rate_limit_exceeded", headers={"Retry-After": str(wait)})


def _rate(text: str, where: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is no rate limit; write one as 60/minute or 1000/hour.") from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
