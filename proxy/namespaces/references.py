"""How an operator writes what is meant: references as a client's are, and globs over full names."""

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
    """`field` cannot be read; why not, as a sentence."""

    def __init__(self, field: str, cause: object) -> None:
        super().__init__(f"{field}: {cause}")
        self.field = field


@dataclass(frozen=True, slots=True)
class ImageReference:
    """What somebody wrote, and what it was read as."""

    text: str
    repository: str
    reference: Reference

    @property
    def namespace(self) -> str:
        return self.repository.partition("/")[0]


class ReferenceReader:
    """Every method raises BadField."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    def pattern(self, field: str, text: str) -> Pin:
        """With the full name, where it names one repository."""
        wanted = read_pattern(field, text)
        repository = wanted.parts[0]
        if is_glob(repository):
            return wanted
        return read_pattern(field, self._qualify(field, repository) + wanted.pattern[len(repository) :])

    def reference(self, field: str, text: str) -> ImageReference:
        """`name`, `name:tag`, `name@digest`, `name:tag@digest`: then the tag does not count."""
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
    """The pattern as it is.  Raises BadField."""
    try:
        return Pin(text)
    except ValueError as error:
        raise FieldInvalid(field, error) from None


def read_platforms(field: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Raises BadField."""
    try:
        return tuple(map(parse_platform, texts))
    except ValueError as error:
        raise FieldInvalid(field, error) from None


def read_seconds(field: str, text: str) -> float:
    """Raises BadField."""
    try:
        return parse_timeout(text)
    except ValueError as error:
        raise FieldInvalid(field, error) from None
