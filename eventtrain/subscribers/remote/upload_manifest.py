"""What is known of a checkpoint in a store: shared by those who put it there and fetch it. Nothing in it is ever run.

Below the URL of an upload lies what lies in the run's directory, under the same paths. Beside the files of a checkpoint
lies ``manifest.json``, written when all of them had arrived; without it there is no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from eventtrain.errors import ConfigurationError, SnapshotError
from eventtrain.subscribers.checkpointing.manifest import MANIFEST as CHECKPOINT_MANIFEST

try:
    from eventtrain.subscribers.remote import object_store
except ModuleNotFoundError:
    object_store = None

if TYPE_CHECKING:
    from eventtrain.subscribers.remote.object_store import ObjectStore

FORMAT = "eventtrain-upload"
UPLOAD_MANIFEST = "manifest.json"


def leads_below(path: str) -> bool:
    """Whether a path with slashes leads to something below wherever it is put, on any system."""
    parts = path.split("/")
    plain = not any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts)
    return plain and not PureWindowsPath(path).drive


def _inside(path: str) -> str:
    if not leads_below(path):
        raise ValueError("does not lead to a file below the folder")
    return path


class UploadedFile(BaseModel):
    """One file. ``path``: below its folder, with slashes; ``sha256``: of its first ``size_bytes`` bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(_inside)]
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _whole(files: tuple[UploadedFile, ...]) -> tuple[UploadedFile, ...]:
    paths = [file.path for file in files]
    if len(set(paths)) < len(paths):
        raise ValueError("names a file twice")
    if CHECKPOINT_MANIFEST not in paths:
        raise ValueError(f"has no {CHECKPOINT_MANIFEST}, so it is no checkpoint's")
    return files


class UploadManifest(BaseModel):
    """A checkpoint in a store.

    Attributes:
        eventtrain: the version that uploaded it.
        step, tag, run_id, time: as in the checkpoint; ``time`` is when it was written.
        resumable: a run can go on from it.
        files: all of them but this manifest.
        logs: how far the run's logs, below the URL of the upload, had come then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["eventtrain-upload"] = FORMAT
    schema_version: Literal[1] = 1
    eventtrain: str
    step: int = Field(ge=0)
    tag: str | None
    run_id: str
    time: datetime
    resumable: bool
    files: Annotated[tuple[UploadedFile, ...], AfterValidator(_whole)]
    logs: tuple[UploadedFile, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> UploadManifest | None:
        """From what lies in a store; None where it is nothing of ours.

        Raises:
            SnapshotError: it is ours, and broken, of another version, or names a file outside of its folder.
        """
        try:
            values: Any = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict) or values.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
            return None
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, wrong["loc"]))
            raise SnapshotError(f"its {UPLOAD_MANIFEST} is not valid: {place}: {wrong['msg']}") from None

    def to_bytes(self) -> bytes:
        """As ``parse`` reads it."""
        return self.model_dump_json(indent=1).encode()

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def identity(self) -> str:
        """The SHA-256 of ``eventtrain.json``, which holds a checksum of each array: alike only for one checkpoint."""
        return next(file.sha256 for file in self.files if file.path == CHECKPOINT_MANIFEST)


def keep_secret(values: Mapping[str, str | bool | SecretStr]) -> Mapping[str, bool | SecretStr]:
    """The same, with every text as a SecretStr."""
    return {key: SecretStr(value) if isinstance(value, str) else value for key, value in values.items()}


Options = Annotated[Mapping[str, str | bool | SecretStr], AfterValidator(keep_secret)]
"""Of obstore's S3Store, GCSStore or AzureStore, and of its HTTP client. Any text among them may be secret."""


def connect(owner: str, url: str, options: Options | None, timeout_s: float) -> ObjectStore:
    """The store at ``url``, which is not spoken to yet.

    Raises:
        ConfigurationError: obstore is missing, or ``url`` or ``options`` cannot work.
    """
    if object_store is None:
        raise ConfigurationError(
            f"{owner} needs obstore, also for a folder. Install it: pip install 'eventtrain[upload]'."
        )
    plain = {
        key: value.get_secret_value() if isinstance(value, SecretStr) else value
        for key, value in (options or {}).items()
    }
    return object_store.ObjectStore(owner, url, plain, timeout_s=timeout_s)
