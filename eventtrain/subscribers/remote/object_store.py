"""``ObjectStore``: one place in an object store, over obstore; files go there in parts and are checked.

Blocking; any thread. What obstore says of a failure may quote what a server sent, keys included, so none of it is
passed on: ``StorageError`` is made of words of ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit
from urllib.request import url2pathname

import obstore
from obstore.store import LocalStore, from_url

from eventtrain.errors import ConfigurationError, StorageError

PART_BYTES = 8 * 2**20
"""Larger files travel in parts of this size, and this much is read at a time."""
MOST_PARTS = 9_000
"""S3 takes 10,000."""
PARTS_AT_ONCE = 4
"""Of one file, each held in memory."""
REQUEST_RETRIES: Any = {
    "max_retries": 3,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}
"""Of one request, by obstore, so that one busy answer does not send a file of a thousand parts back to its start."""
CLIENT_OPTIONS = frozenset(
    {
        "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only", "pool_idle_timeout",
        "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "read_timeout",
        "root_certificate", "user_agent",
    }
)  # fmt: skip
"""obstore takes these apart from the options of the store."""
SIGNS = {
    "kind: Timeout": "no answer in time",
    "BadScheme": "a plain http endpoint needs the option allow_http",
    "dns error": "the host's name is not known",
    "ConnectionRefused": "the connection was refused",
    "kind: Connect": "no connection",
    "TooManyRedirects": "it redirects on and on",
    "No such file or directory": "there is no such folder",
    "No space left on device": "no space left on the device",
    "Permission denied": "permission denied",
}
"""What is found in obstore's errors -> what is said of them."""
CODES = (
    "AccessDenied", "BadDigest", "ExpiredToken", "InvalidAccessKeyId", "NoSuchBucket", "PermanentRedirect",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch", "SlowDown",
)  # fmt: skip
"""S3's words for what is wrong, named where an answer holds them."""
MAY_PASS = frozenset({408, 409, 425, 429})
"""HTTP statuses below 500 that may be different the next time."""


class Source(Protocol):
    """A file to be sent, of a size that does not change. ``read`` raises StorageError where it cannot."""

    @property
    def size_bytes(self) -> int:
        """How much is sent."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on."""
        ...


class ObjectStore:
    """What lies below one URL; ``open`` it first. Paths are relative, with slashes.

    Args:
        owner: whom messages are about.
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, or an absolute folder, also as
            ``file://``. It is shown, so nothing in it may be secret.
        options: of obstore's S3Store, GCSStore or AzureStore, and of its HTTP client.
        timeout_s: of one request, which carries one part at most.

    Raises:
        ConfigurationError: ``url`` or ``options`` cannot work; no value is quoted.
    """

    def __init__(self, owner: str, url: str, options: Mapping[str, str | bool], *, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._folder = _folder(owner, url)
        if self._folder is not None:
            if options:
                raise ConfigurationError(f"{owner}(options=...): a folder takes none.")
            return
        client = {key: value for key, value in options.items() if key in CLIENT_OPTIONS}
        config: Any = {key: value for key, value in options.items() if key not in CLIENT_OPTIONS}
        client_options: Any = {**client, "timeout": timedelta(seconds=timeout_s)}
        try:
            self._store: Any = from_url(
                self.url, config=config, client_options=client_options, retry_config=REQUEST_RETRIES
            )
        except Exception as error:
            unknown = re.search(r"key: '(\w+)' is not valid", str(error))
            missing = re.search(r"source: (Missing\w+)", str(error))  # the name of a variant, no value
            what = (
                f"there is no option {unknown[1]!r}" if unknown else (missing or [0, "a value is wrong"])[1]
            )
            raise ConfigurationError(
                f"{owner}: obstore cannot open {self.url} with these options ({what}). They are those of its S3Store, "
                "GCSStore, AzureStore and ClientConfig; their values are not shown."
            ) from None  # the text of the error may quote values

    def open(self, *, make: bool = True) -> None:
        """Where it is a folder, make it, unless it has to be there. Raises StorageError."""
        if self._folder is not None:
            with _told(self.url):
                self._store = LocalStore(self._folder, mkdir=make)

    def put(self, path: str, source: Source) -> str:
        """Send a file and make sure that it arrived; returns its SHA-256.

        The size there has to be right, and the ETag the MD5 of what was sent (for a file in parts the MD5 of the parts'
        MD5s), as S3 computes it. Where the ETag is another, as with KMS or in a folder, the file is read back and its
        SHA-256 compared.

        Raises:
            StorageError: it did not arrive, or ``source`` cannot be read.
        """
        parts = _Parts(source)
        with _told(path):
            if source.size_bytes <= PART_BYTES:
                obstore.put(self._store, path, b"".join(parts), use_multipart=False)
            else:
                obstore.put(
                    self._store,
                    path,
                    iter(parts),
                    chunk_size=parts.part_bytes,
                    max_concurrency=PARTS_AT_ONCE,
                )
            there = obstore.head(self._store, path)
        sha256 = parts.sha256
        same_tag = (there["e_tag"] or "").strip('"') == parts.e_tag
        if there["size"] != source.size_bytes or not (same_tag or self.sha256(path) == sha256):
            raise StorageError(f"{path}: what arrived is not what was sent", may_pass=True)
        return sha256

    def write(self, path: str, data: bytes) -> None:
        """As ``put``, of a small object."""
        self.put(path, _Bytes(data))

    def read(self, path: str) -> bytes | None:
        """A small object; None where there is none. Raises StorageError."""
        with _told(path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def size_bytes(self, path: str) -> int | None:
        """Of what lies there; None where nothing does. Raises StorageError."""
        with _told(path):
            try:
                return obstore.head(self._store, path)["size"]
            except FileNotFoundError:
                return None

    def sha256(self, path: str) -> str:
        """Of what lies there, read back. Raises StorageError."""
        digest = hashlib.sha256()
        for part in self.parts(path, self.size_bytes(path) or 0):
            digest.update(part)
        return digest.hexdigest()

    def parts(self, path: str, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes of what lies there. Raises StorageError, also where there are fewer."""
        for offset in range(0, size, PART_BYTES):
            length = min(PART_BYTES, size - offset)
            with _told(path):
                part = bytes(obstore.get_range(self._store, path, start=offset, length=length))
            if len(part) != length:
                raise StorageError(f"{path}: it has less than {size} bytes there", may_pass=True)
            yield part

    def rename(self, path: str, new: str) -> None:
        """Give what lies at ``path`` another name. Raises StorageError."""
        with _told(path):
            obstore.rename(self._store, path, new)

    def names(self) -> list[str]:
        """The paths of everything. Raises StorageError."""
        with _told(self.url):
            return [one["path"] for some in obstore.list(self._store) for one in some]


@dataclass(frozen=True)
class _Bytes:
    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class _Parts:
    """The parts of a source, each read once; afterwards its digests."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.part_bytes = max(PART_BYTES, -(-source.size_bytes // MOST_PARTS))
        self._sha256 = hashlib.sha256()
        self._md5s: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        size = self._source.size_bytes
        for offset in range(0, size, self.part_bytes):
            data = self._source.read(offset, min(self.part_bytes, size - offset))
            self._sha256.update(data)
            self._md5s.append(hashlib.md5(data, usedforsecurity=False).digest())
            yield data

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def e_tag(self) -> str:
        if self._source.size_bytes <= PART_BYTES:
            return b"".join(self._md5s).hex()  # of an empty file: "", which is no ETag, so it is read back
        whole = hashlib.md5(b"".join(self._md5s), usedforsecurity=False).hexdigest()
        return f"{whole}-{len(self._md5s)}"


def _folder(owner: str, url: str) -> Path | None:
    """The folder that ``url`` is; None where it is a store's. ConfigurationError where it is neither."""
    try:
        parts = urlsplit(url) if "://" in url else SplitResult("file", "", url, "", "")
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{owner}(url=...): it has a user, a query or a fragment. A URL is shown in events and logs, so keys "
            "belong in options, or in the environment. The one given is not shown."
        )
    if parts.scheme == "file" and not parts.netloc:
        folder = Path(url2pathname(parts.path) if "://" in url else url)
        if folder.is_absolute():
            return folder
    elif parts.scheme in ("s3", "gs", "az") and parts.netloc:
        return None
    raise ConfigurationError(
        f"{owner}(url=...): needs s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or an absolute folder. "
        "The one given is not shown: it may hold secrets."
    )


@contextmanager
def _told(what: str) -> Generator[None]:
    """Turns what obstore raises into a StorageError about ``what``."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise _translated(what, str(error)) from None


def _translated(what: str, text: str) -> StorageError:
    status = re.search(r"non-2xx status code: (\d{3})", text)
    if status is None:
        reason = next((said for sign, said in SIGNS.items() if sign in text), "the store failed")
        return StorageError(f"{what}: {reason}", may_pass=True)
    number = int(status[1])
    code = next((f" {code}" for code in CODES if f"<Code>{code}</Code>" in text), "")
    hint = "; redirects are not followed" if 300 <= number < 400 else ""
    return StorageError(
        f"{what}: HTTP status {number}{code}{hint}", may_pass=number >= 500 or number in MAY_PASS
    )
