"""The names, references, patterns and durations that an operator gives to a command or to the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.config.image_names import split
from proxy.config.quantities import parse_timeout
from proxy.config.values import parse_platform
from proxy.namespaces.routing import Namespaces
from storage.errors import RegistryError
from storage.maintenance.pins import Pin
from storage.names import is_glob
from storage.oci import Digest, Reference, Tag


class FieldInvalid(ValueError):
    """The value of `field`, a parameter of a command or of the API, cannot be read."""

    def __init__(self, field: str, cause: object) -> None:
        super().__init__(f"{field}: {cause}")
        self.field = field
        self.cause = str(cause)


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image as an operator wrote it, and its full name and reference."""

    text: str
    repository: str
    reference: Reference

    @property
    def namespace(self) -> str:
        return self.repository.partition("/")[0]


class ReferenceReader:
    """Reads names as clients' names are read.  Every method raises FieldInvalid."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    def pattern(self, field: str, text: str) -> Pin:
        """Read a pattern.  One that names a single repository gets its full name."""
        pattern = read_pattern(field, text)
        repository = pattern.parts[0]
        if is_glob(repository):
            return pattern
        return read_pattern(field, self._qualify(field, repository) + pattern.pattern[len(repository) :])

    def listing(self, field: str, text: str) -> Pin:
        """Read a pattern of what to list: the name of a namespace stands for all that is in it."""
        name = self._namespaces.chosen(ns=text.removesuffix("/"))
        return self.pattern(field, text if name is None else f"{name}/*")

    def reference(self, field: str, text: str) -> ImageReference:
        """`name`, `name:tag`, `name@digest`, `name:tag@digest`, whose tag is ignored."""
        name, tag, digest = split(text)
        try:
            reference: Reference
            if digest is not None:
                reference = Digest.parse(digest)
            else:
                reference = Tag.parse("latest" if tag is None else tag)
        except RegistryError as error:
            raise FieldInvalid(field, error) from None
        return ImageReference(text, self._qualify(field, name), reference)

    def _qualify(self, field: str, name: str) -> str:
        try:
            return self._namespaces.qualify(name)
        except RegistryError as error:
            raise FieldInvalid(field, error) from None


def read_pattern(field: str, text: str) -> Pin:
    """Read a pattern over full names.  Raises FieldInvalid."""
    try:
        return Pin(text)
    except ValueError as error:
        raise FieldInvalid(field, error) from None


def read_platforms(field: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Raises FieldInvalid."""
    try:
        return tuple(map(parse_platform, texts))
    except ValueError as error:
        raise FieldInvalid(field, error) from None


def read_seconds(field: str, text: str) -> float:
    """Raises FieldInvalid."""
    try:
        return parse_timeout(text)
    except ValueError as error:
        raise FieldInvalid(field, error) from None
