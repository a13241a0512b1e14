"""The configuration of an image: image-spec, config.md.  Nothing in it is as it should be for certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from proxy.admin.models import BuildStep
from proxy.namespaces.references import FieldInvalid
from storage.concurrency import run_in_thread
from storage.errors import BlobUnknown
from storage.oci import Digest
from storage.store import Store

CONFIG_LIMIT = 4 << 20  # bytes; those of images have some kilobytes


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What a configuration says; what it does not say is empty.

    Of a value that should be text and is not, the text is its JSON.
    """

    created: str = ""
    author: str = ""
    os: str = ""
    os_version: str = ""
    architecture: str = ""
    variant: str = ""
    user: str = ""
    directory: str = ""
    stop_signal: str = ""
    args_escaped: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    shell: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    history: list[BuildStep] = field(default_factory=list)


async def read_config(store: Store, repository: str, digest: Digest) -> bytes:
    """The content of a configuration.  Raises BlobUnknown, StorageFailed, FieldInvalid if it is too large."""
    if await run_in_thread(store.linked, repository, digest) is None:
        raise BlobUnknown(f"{repository} has no blob {digest}")
    blob = await store.get_blob(repository, digest)
    try:
        content = bytearray()
        async for chunk in blob.chunks():
            content += chunk
            if len(content) > CONFIG_LIMIT:
                raise FieldInvalid("ref", f"its configuration has more than {CONFIG_LIMIT} bytes")
        return bytes(content)
    finally:
        await blob.close()


def parse_config(content: bytes) -> ImageConfig | None:
    """What a configuration of any form says; None if it is no JSON object."""
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    run = _mapping(found.get("config"))
    return ImageConfig(
        created=_string(found.get("created")),
        author=_string(found.get("author")),
        os=_string(found.get("os")),
        os_version=_string(found.get("os.version")),
        architecture=_string(found.get("architecture")),
        variant=_string(found.get("variant")),
        user=_text(run.get("User")),
        directory=_text(run.get("WorkingDir")),
        stop_signal=_text(run.get("StopSignal")),
        args_escaped=_text(run.get("ArgsEscaped") or None),
        entrypoint=_texts(run.get("Entrypoint")),
        command=_texts(run.get("Cmd")),
        shell=_texts(run.get("Shell")),
        environment=_texts(run.get("Env")),
        ports=sorted(_mapping(run.get("ExposedPorts"))),
        volumes=sorted(_mapping(run.get("Volumes"))),
        labels={name: _text(value) for name, value in _mapping(run.get("Labels")).items()},
        history=[
            BuildStep(
                created=parse_created(_string(each.get("created"))),
                created_by=_text(each.get("created_by")),
                comment=_text(each.get("comment")),
                empty=each.get("empty_layer") is True,
            )
            for each in map(_mapping, _list(found.get("history")))
        ],
    )


def layer_steps(history: Sequence[BuildStep], count: int) -> list[BuildStep | None]:
    """The step that made each of `count` layers; None where that cannot be told."""
    made: list[BuildStep | None] = [each for each in history if not each.empty]
    return made if len(made) == count else [None] * count


def parse_created(text: str) -> float | None:
    """RFC 3339 as seconds since the epoch; None without one, and for the year 1."""
    try:
        at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return at if at > 0 else None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _texts(value: object) -> list[str]:
    return [_text(each) for each in _list(value)]
