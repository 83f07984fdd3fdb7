"""The clients that reach buckets: fsspec's file systems, TensorStore's drivers, and their errors.

Busy servers (429, 5xx), resets, time-outs and bodies that end early are tried again, with a
back-off, here and in the clients.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from moss_audio_jax.errors import InputError, UsageError, extra

T = TypeVar("T")

_ATTEMPTS = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0  # seconds, doubled in between
_RETRIES = {"max_retries": 16, "initial_delay": "200ms", "max_delay": "20s"}
_EXTRA = {"gs": "gcsfs", "s3": "s3fs"}


def told(error: BaseException) -> str:
    """What a bucket's error means, on one line; says so if credentials are missing."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    name = type(error).__name__
    low = text.lower()
    refused = any(word in low for word in ("anonymous caller", "forbidden", "401", "403", "access"))
    lacking = any(
        word in low for word in ("credentials", "anonymous", "could not refresh", "oauth", "imds")
    )
    if lacking or name in ("NoCredentialsError", "DefaultCredentialsError"):
        return (
            "no credentials: for gs:// set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth "
            "application-default login; for s3:// set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"or AWS_PROFILE ({text[:120]})"
        )
    if isinstance(error, PermissionError) or (refused and "denied" in low):
        return f"these credentials may not: {text[:200]}"
    return text if len(text) <= 300 else f"{text[:296]} ..."


def is_ours(error: BaseException) -> bool:
    """Whether an error comes from a client of buckets."""
    rooms = ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google.auth", "fsspec")
    return type(error).__module__.startswith(rooms)


def tried(action: Callable[[], T]) -> T:
    """The result of `action`, which is tried again where that can help."""
    wait = _FIRST_WAIT
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == _ATTEMPTS or not _may_pass(error):
                raise
            time.sleep(wait * (0.5 + random.random()))
            wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    text, name = str(error), type(error).__name__
    status = getattr(error, "code", None) or getattr(error, "errno", None)
    if str(status) in ("408", "429", "500", "502", "503", "504", "5", "16"):  # 5: EIO, 16: EBUSY
        return True
    words = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "SlowDown")
    return name.startswith("Client") or any(word in text for word in words)


def bare(path: str | os.PathLike[str]) -> str:
    """bucket/name, as fsspec lists it."""
    return os.fspath(path).partition("://")[2].rstrip("/")


def file_system(path: str | os.PathLike[str]) -> Any:
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _EXTRA:
        raise InputError(
            f"{path}: nothing here reads such addresses; expected a local path, gs:// or s3://"
        )
    return _file_system_of(scheme)


@functools.cache
def _file_system_of(scheme: str) -> Any:
    """fsspec's file system; epath makes one with the same settings."""
    # Asking what kind of bucket it is takes rights that a run does not need otherwise.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if endpoint := os.environ.get("STORAGE_EMULATOR_HOST"):  # ArrayRecord's own reader
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
    try:
        import fsspec
        import fsspec.config

        # TensorStore and other processes write too, so a list of names would be out of date.
        for protocol in ("gcs", "s3"):
            fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
        logging.getLogger("gcsfs").addFilter(_not_repeated)
        return fsspec.filesystem({"gs": "gcs"}.get(scheme, scheme))
    except ImportError:
        raise UsageError(
            f"{scheme}:// needs {_EXTRA[scheme]}; install the extra `buckets` ({extra('buckets')})"
        ) from None


def _not_repeated(record: logging.LogRecord) -> bool:
    """gcsfs prints the traceback of what it also raises."""
    return record.levelno < logging.WARNING or not record.exc_info


def kvstore(path: str | os.PathLike[str]) -> dict[str, Any]:
    """TensorStore's description of a place in a bucket."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": name, "gcs_request_retries": _RETRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": name, "s3_request_retries": _RETRIES}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec |= {"aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # or it complains of profiles that are not there
        spec |= {"aws_credentials": {"type": "environment"}}
    return spec


@functools.cache
def teach_orbax() -> None:
    """Lets Orbax, which knows gs:// alone, store arrays in s3:// through TensorStore's driver."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    gcs, normal = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
    is_gcs = tensorstore_utils._use_gcs_driver

    def spec(path: str) -> dict[str, Any]:
        return kvstore(path) if str(path).startswith("s3://") else gcs(path)

    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normal(path))
    tensorstore_utils._use_gcs_driver = lambda path: is_gcs(path) or path.startswith("s3://")


@functools.lru_cache(64)
def _opened(bucket: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.open({**kvstore(bucket), "path": ""}).result()


def store(path: str | os.PathLike[str]) -> tuple[Any, str]:
    file_system(path)  # whose errors are clearer
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    return _opened(f"{scheme}://{bucket}"), name
