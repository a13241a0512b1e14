"""The command that writes a lock file: lock."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from proxy.admin.api.client import OperationFailed
from proxy.admin.dockerfiles import base_images, is_dockerfile
from proxy.admin.image_files import Unreadable, find_images
from proxy.admin.operations import Operations
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from storage.names import written


class LockedImage(msgspec.Struct, frozen=True):
    """An image by its full name and tag, and its digest; without a tag if it is named by that."""

    image: str
    digest: str


@command()
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="HOST[:PORT]",
    help="An address of this server that prefixes names in the files. Can be repeated.",
)
@common
def lock(call: CommandContext, files: tuple[str, ...], registries: tuple[str, ...]) -> None:
    """Write down the digests of images.

    FILES are compose files, Kubernetes manifests, Dockerfiles or lists of references; - is standard input.
    Prints a line `image@digest` for each image, as it is stored now, for a rule with `locked` in the policy.
    No upstream is asked: fetch what is not stored by entrepot warm.
    """

    async def work(operations: Operations) -> None:
        rows, missing = [], []
        for reference in _references(files, registries):
            found = await operations.why(reference)
            digest = found.held.digest if found.held is not None else found.digest
            if digest is None:
                missing.append(reference)
                continue
            named = found.repository if ":" in found.reference else written(found.repository, found.reference)
            rows.append(LockedImage(named, digest))
        if missing:
            names = ", ".join(missing)
            raise OperationFailed(f"not stored: {names}; fetch them first (entrepot warm)", "INCOMPLETE")
        if call.json:
            click.echo(msgspec.json.encode(rows))
            return
        for line in dict.fromkeys(f"{each.image}@{each.digest}" for each in rows):
            click.echo(line)

    call.run(work)


def _references(files: Sequence[str], registries: Sequence[str]) -> list[str]:
    """Each image once, in the order of the files.  Raises OperationFailed."""
    found: list[str] = []
    try:
        for path in files:
            if is_dockerfile(path):
                found += [image for _, image in base_images(_text(path), os.environ)]
            else:
                found += find_images([path], sys.stdin, os.environ, registries).references
    except (Unreadable, ValueError) as error:
        raise OperationFailed(str(error), "FILE_INVALID", usage=True) from error
    if not found:
        raise OperationFailed(f"no image is named in {', '.join(files)}", "NOTHING_NAMED")
    return list(dict.fromkeys(found))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None


COMMANDS = (lock,)
