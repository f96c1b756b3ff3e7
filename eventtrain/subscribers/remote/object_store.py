"""``ObjectStore``: one place in an object store, over obstore; files are sent in parts and checked.

Blocking; any thread. obstore's messages may quote what a server sent, keys included, so none of them is passed on:
the text of a ``StorageError`` is written here.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit
from urllib.request import url2pathname

from pydantic import AfterValidator, SecretStr

from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.validation.optional_imports import import_optional, require_installed

T = TypeVar("T")
R = TypeVar("R")

USED_BY = "Copying checkpoints to or from a store or folder"
obstore = import_optional("obstore", extra="upload", used_by=USED_BY)
stores = import_optional("obstore.store", extra="upload", used_by=USED_BY)

PART_BYTES = 8 * 2**20
"""Larger files are sent in parts of this size, and this much is read at a time."""
PART_LIMIT = 9_000
"""S3 takes 10,000."""
PARTS_AT_ONCE = 4
"""Parts of one file that are sent at once, each held in memory."""
REQUEST_RETRIES: Any = {
    "max_retries": 3,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}
"""Retries of one request, by obstore: after one busy answer a file of a thousand parts does not start again."""
CLIENT_OPTIONS = frozenset(
    {
        "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only", "pool_idle_timeout",
        "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "read_timeout",
        "root_certificate", "user_agent",
    }
)  # fmt: skip
"""obstore takes these apart from the options of the store."""
REASONS = {
    "kind: Timeout": "no answer in time",
    "BadScheme": "a plain http endpoint needs the option allow_http",
    "dns error": "the host name is not known",
    "ConnectionRefused": "the connection was refused",
    "kind: Connect": "no connection",
    "TooManyRedirects": "too many redirects",
    "No such file or directory": "there is no such folder",
    "No space left on device": "no space left on the device",
    "Permission denied": "permission denied",
}
"""Text in an error of obstore -> text of the StorageError."""
S3_CODES = (
    "AccessDenied", "BadDigest", "ExpiredToken", "InvalidAccessKeyId", "NoSuchBucket", "PermanentRedirect",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch", "SlowDown",
)  # fmt: skip
"""S3's error codes, named if an answer contains them."""
TEMPORARY_STATUSES = frozenset({408, 409, 425, 429})
"""HTTP statuses below 500 after which another attempt may succeed."""


def keep_secret(values: Mapping[str, str | bool | SecretStr]) -> Mapping[str, bool | SecretStr]:
    """Returns ``values`` with every text as a SecretStr."""
    return {key: SecretStr(value) if isinstance(value, str) else value for key, value in values.items()}


Options = Annotated[Mapping[str, str | bool | SecretStr], AfterValidator(keep_secret)]
"""Options of obstore's S3Store, GCSStore or AzureStore, and of its HTTP client. Any text among them may be secret."""


class ObjectStore:
    """Everything below one URL; ``open`` it first. Paths are relative, with slashes.

    Arguments are as of ``Uploader``; ``owner`` is the name in errors. The constructor does not contact the store, and
    raises ConfigurationError without quoting a value. All other methods raise StorageError.
    """

    def __init__(self, owner: str, url: str, options: Options | None, *, timeout_s: float) -> None:
        require_installed(obstore)
        self.url = url.rstrip("/")
        self._folder = _folder(owner, url)
        if self._folder is not None:
            if options:
                raise ConfigurationError(f"{owner}(options=...): a folder takes no options.")
            return
        client: dict[str, Any] = {}
        config: dict[str, Any] = {}
        for key, value in (options or {}).items():
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            (client if key in CLIENT_OPTIONS else config)[key] = plain
        client_options: Any = {**client, "timeout": timedelta(seconds=timeout_s)}
        try:
            self._store: Any = stores.from_url(
                self.url, config=config, client_options=client_options, retry_config=REQUEST_RETRIES
            )
        except Exception as error:
            unknown = re.search(r"key: '(\w+)' is not valid", str(error))
            missing = re.search(r"source: (Missing\w+)", str(error))  # the name of a variant, no value
            what = f"unknown option {unknown[1]!r}" if unknown else (missing or [0, "a value is invalid"])[1]
            raise ConfigurationError(
                f"{owner}: obstore cannot open {self.url} with these options: {what}. They must be options of its "
                "S3Store, GCSStore, AzureStore or ClientConfig; their values are not shown."
            ) from None  # the text of the error may quote values

    def open(self, *, make: bool = True) -> None:
        """Opens a folder, and creates it if it is missing and ``make``; does nothing for a store."""
        if self._folder is not None:
            with _without_text(self.url):
                self._store = stores.LocalStore(self._folder, mkdir=make)

    def put(self, path: str, size_bytes: int, read: Callable[[int, int], bytes]) -> str:
        """Sends a file and checks that it arrived; returns its SHA-256.

        The size in the store must be right, and the ETag must be the MD5 of what was sent (of a file in parts, the MD5
        of the parts' MD5s), as S3 computes it. If the ETag is another, as with KMS or in a folder, the file is read
        back and its SHA-256 compared.

        Args:
            path: in the store.
            size_bytes: of the file, which does not change.
            read: offset, size -> that many bytes; raises StorageError if it cannot.
        """
        part_bytes = max(PART_BYTES, -(-size_bytes // PART_LIMIT))
        sha256, md5s = hashlib.sha256(), list[bytes]()

        def parts() -> Iterator[bytes]:
            for offset in range(0, size_bytes, part_bytes):
                data = read(offset, min(part_bytes, size_bytes - offset))
                sha256.update(data)
                md5s.append(hashlib.md5(data, usedforsecurity=False).digest())
                yield data

        with _without_text(path):
            if size_bytes <= PART_BYTES:
                obstore.put(self._store, path, b"".join(parts()), use_multipart=False)
            else:
                obstore.put(self._store, path, parts(), chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
            arrived = obstore.head(self._store, path)
        e_tag = b"".join(md5s).hex()  # of an empty file: "", which is not an ETag, so it is read back
        if size_bytes > PART_BYTES:
            e_tag = f"{hashlib.md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-{len(md5s)}"
        digest = sha256.hexdigest()
        same_tag = (arrived["e_tag"] or "").strip('"') == e_tag
        if arrived["size"] != size_bytes or not (same_tag or self.sha256(path) == digest):
            raise StorageError(f"{path}: what arrived is not what was sent", may_pass=True)
        return digest

    def write(self, path: str, data: bytes) -> None:
        """``put`` for a small object."""
        self.put(path, len(data), lambda offset, size: data[offset : offset + size])

    def read(self, path: str) -> bytes | None:
        """Returns a small object; None if there is none."""
        with _without_text(path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def size_bytes(self, path: str) -> int | None:
        """Returns the size of an object; None if there is none."""
        with _without_text(path):
            try:
                return obstore.head(self._store, path)["size"]
            except FileNotFoundError:
                return None

    def sha256(self, path: str) -> str:
        """Returns the SHA-256 of an object, read back."""
        digest = hashlib.sha256()
        for part in self.parts(path, self.size_bytes(path) or 0):
            digest.update(part)
        return digest.hexdigest()

    def parts(self, path: str, size: int) -> Iterator[bytes]:
        """Yields the first ``size`` bytes of an object. Raises StorageError also if it has fewer."""
        for offset in range(0, size, PART_BYTES):
            length = min(PART_BYTES, size - offset)
            with _without_text(path):
                part = bytes(obstore.get_range(self._store, path, start=offset, length=length))
            if len(part) != length:
                raise StorageError(f"{path}: it has less than {size} bytes", may_pass=True)
            yield part

    def rename(self, path: str, new: str) -> None:
        """Renames an object."""
        with _without_text(path):
            obstore.rename(self._store, path, new)

    def names(self) -> list[str]:
        """Returns the paths of all objects."""
        with _without_text(self.url):
            return [one["path"] for some in obstore.list(self._store) for one in some]


def in_parallel(action: Callable[[T], R], items: Iterable[T], *, threads: int, name: str) -> list[R]:
    """Returns ``action`` of each item, in order, computed by several threads; the first that raises ends them all.

    The threads are daemons, unlike an executor's: one that hangs on a dead server does not keep the program alive.
    """
    todo = list(enumerate(items))[::-1]
    results: dict[int, R] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            try:
                index, item = todo.pop()
            except IndexError:
                return
            try:
                results[index] = action(item)
            except BaseException as error:
                failures.append(error)

    count = min(threads, len(todo))
    workers = [threading.Thread(target=work, name=f"eventtrain {name}", daemon=True) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as error:
        failures.append(error)
        raise
    if failures:
        raise failures[0]
    return [results[index] for index in sorted(results)]


def _folder(owner: str, url: str) -> Path | None:
    """Returns the folder that ``url`` names; None if it names a store. Raises ConfigurationError if neither."""
    try:
        parts = urlsplit(url) if "://" in url else SplitResult("file", "", url, "", "")
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{owner}(url=...): url must have no user, query or fragment, since it is shown in events and logs. Pass "
            "keys in options, or in the environment. The value is not shown."
        )
    if parts.scheme == "file" and not parts.netloc:
        folder = Path(url2pathname(parts.path) if "://" in url else url)
        if folder.is_absolute():
            return folder
    elif parts.scheme in ("s3", "gs", "az") and parts.netloc:
        return None
    raise ConfigurationError(
        f"{owner}(url=...): url must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or an absolute "
        "folder. The value is not shown: it may contain secrets."
    )


@contextmanager
def _without_text(subject: str) -> Generator[None]:
    """Turns an error of obstore into a StorageError about ``subject`` that quotes nothing of it."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise _translated(subject, str(error)) from None


def _translated(subject: str, text: str) -> StorageError:
    status = re.search(r"non-2xx status code: (\d{3})", text)
    if status is None:
        reason = next((reason for sign, reason in REASONS.items() if sign in text), "the store failed")
        return StorageError(f"{subject}: {reason}", may_pass=True)
    number = int(status[1])
    code = next((f" {code}" for code in S3_CODES if f"<Code>{code}</Code>" in text), "")
    hint = "; redirects are not followed" if 300 <= number < 400 else ""
    return StorageError(
        f"{subject}: HTTP status {number}{code}{hint}",
        may_pass=number >= 500 or number in TEMPORARY_STATUSES,
    )
