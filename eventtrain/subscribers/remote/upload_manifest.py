"""``UploadManifest``: the files of a checkpoint in a store, for uploading and downloading. Nothing in it is ever run.

Below the URL of an upload are the files of the run's directory, under the same paths. Beside the files of a checkpoint
is ``manifest.json``, written when all of them had arrived; without it there is no checkpoint.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from eventtrain.errors import SnapshotError
from eventtrain.subscribers.checkpointing.manifest import MANIFEST as CHECKPOINT_MANIFEST

FORMAT = "eventtrain-upload"
UPLOAD_MANIFEST = "manifest.json"


def leads_below(path: str) -> bool:
    """Returns whether a path with slashes stays below any folder that it is joined to, on every system."""
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


def _complete(files: tuple[UploadedFile, ...]) -> tuple[UploadedFile, ...]:
    paths = [file.path for file in files]
    if len(set(paths)) < len(paths):
        raise ValueError("names a file twice")
    if CHECKPOINT_MANIFEST not in paths:
        raise ValueError(f"has no {CHECKPOINT_MANIFEST}, so it is not of a checkpoint")
    return files


class UploadManifest(BaseModel):
    """A checkpoint in a store.

    Attributes:
        eventtrain: the version that uploaded it.
        step, tag, run_id, time: as in the checkpoint; ``time`` is when it was written.
        resumable: a run can resume from it.
        files: all of them but this manifest.
        logs: the run's logs below the URL of the upload, as far as they were written then.
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
    files: Annotated[tuple[UploadedFile, ...], AfterValidator(_complete)]
    logs: tuple[UploadedFile, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> UploadManifest | None:
        """Returns the manifest in ``data``; None if that is something else.

        Raises:
            SnapshotError: it is damaged, of another version, or names a file outside of its folder.
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

    @property
    def identity(self) -> str:
        """SHA-256 of ``eventtrain.json``, which has a checksum of each array: equal only for the same checkpoint."""
        return next(file.sha256 for file in self.files if file.path == CHECKPOINT_MANIFEST)
