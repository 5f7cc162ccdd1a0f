"""The client of buckets: TensorStore, which repeats requests that fail, and whose writes may be conditional; fsspec for parts of long files."""

import functools
import logging
import os
import re
import sys
import threading
import time
from typing import Any

from jaxmodels.errors import optional_import

# Requests that fail (5xx, 429, lost connections) are repeated after 0.5, 1, 2, … 16 s.
_RETRIES = {"max_retries": 12, "initial_delay": "500ms", "max_delay": "16s"}
_SILENT_SECONDS = 5.0  # until a line says that a bucket does not answer
_LIMIT_SECONDS = 300.0  # in which one operation must end, with its repetitions
_STALL_SECONDS = "20"  # without a byte, until a request counts as lost


class StorageError(OSError):
    """A bucket cannot be read or written. `strerror` is one line."""

    def __init__(self, message: str, address: str):
        super().__init__(None, message, address)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def spec(scheme: str, bucket: str, key: str = "") -> dict[str, Any]:
    """Return TensorStore's description of a key, or a prefix of keys, in a bucket."""
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket, "path": key}
    if scheme == "s3":
        if endpoint := _s3_endpoint():
            spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else ""):
            spec["aws_region"] = region
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # else TensorStore looks for files first, and complains of each that is missing
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _gcs_endpoint() -> str | None:
    host = os.environ.get("TENSORSTORE_GCS_HTTP_URL") or os.environ.get("STORAGE_EMULATOR_HOST")
    return host if not host or "://" in host else f"http://{host}"


@functools.cache
def context() -> Any:
    """Return the context of all TensorStore operations on buckets: what is repeated, and how often."""
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", _STALL_SECONDS)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    if endpoint := _gcs_endpoint():
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = endpoint
    import tensorstore as ts

    return ts.Context({"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES})


@functools.cache
def store(scheme: str, bucket: str) -> Any:
    """Return TensorStore's key-value store of a bucket."""
    shared = context()  # before TensorStore is imported, which reads the environment
    import tensorstore as ts

    return result(ts.KvStore.open(spec(scheme, bucket), context=shared), f"{scheme}://{bucket}")


def result(future: Any, address: str) -> Any:
    """Return the result of one of TensorStore's futures, which reads or writes at this address. Says once if a bucket does not answer.

    Raises:
      StorageError: it failed, after repetitions.
    """
    end = time.monotonic() + _LIMIT_SECONDS
    try:
        try:
            found = future.result(timeout=_SILENT_SECONDS)
        except TimeoutError:
            _slow.note(address)
            found = future.result(timeout=max(0.0, end - time.monotonic()))
        _slow.clear(address)
        return found
    except TimeoutError:
        raise StorageError(f"no answer for {_LIMIT_SECONDS:.0f} s", address) from None
    except Exception as error:  # TensorStore raises ValueError for most things
        raise StorageError(_words(str(error)), address) from error


class _Slow:
    """The buckets that do not answer now."""

    def __init__(self):
        self._places, self._lock = set(), threading.Lock()

    def note(self, address: str) -> None:
        bucket = _bucket(address)
        with self._lock:
            if bucket in self._places:
                return
            self._places.add(bucket)
        print(f"warning: {bucket} has not answered for {_SILENT_SECONDS:.0f} s; requests are repeated for up to {_LIMIT_SECONDS:.0f} s", file=sys.stderr)

    def clear(self, address: str) -> None:
        bucket = _bucket(address)
        with self._lock:
            answered = bucket in self._places
            self._places.discard(bucket)
        if answered:
            print(f"{bucket} answers again", file=sys.stderr)


_slow = _Slow()


def _bucket(address: str) -> str:
    return "/".join(address.split("/")[:3])


def _words(text: str) -> str:
    """Return one line for an error of TensorStore, with what to do where that is known."""
    line = re.sub(r"\s*\[[a-z_-]+='.*", "", text.splitlines()[0] if text else "", flags=re.DOTALL)[:300]
    if "NoSuchBucket" in text or ("NOT_FOUND" in text and "Not Found" in text):
        return "the bucket does not exist, or these credentials may not see it"
    if re.search("PERMISSION_DENIED|AccessDenied|UNAUTHENTICATED|InvalidAccessKey|SignatureDoesNotMatch|Forbidden", text):
        return f"access is denied ({line}). Log in, or set the credentials of the account that may read and write there"
    return line


@functools.cache
def file_system(scheme: str) -> Any:
    """Return fsspec's file system of a scheme: TensorStore reads parts of objects, but cannot say how long one is."""
    module, extra = ("gcsfs", "gcs") if scheme == "gs" else ("s3fs", "s3")
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "gs" and (emulator := _gcs_endpoint()):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google for the kind of the bucket
        options |= {"endpoint_url": emulator, "token": "anon"}
    elif scheme == "s3":
        options |= {"max_concurrency": 1}  # else a whole object costs a second request, for its size
        options |= {"config_kwargs": {"retries": {"max_attempts": 8, "mode": "standard"}}}  # half a minute, as gcsfs; the default gives up after 8 s
        options |= {"endpoint_url": endpoint} if (endpoint := _s3_endpoint()) else {}
    logging.getLogger(module).setLevel(logging.CRITICAL)  # it would print stack traces of errors, which it also raises
    optional_import(module, extra)  # after the environment is set, which gcsfs reads when it is imported
    return optional_import("fsspec", extra).filesystem(scheme, **options)
