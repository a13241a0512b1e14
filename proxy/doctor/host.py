"""A client's machine: where its files are, and what is said of each client there."""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarl import URL

from proxy.doctor.checks import Check, cause, failed, ok, warning
from proxy.setup.site import Site


class Broken(Exception):
    """Why a file says nothing, in half a sentence."""


@dataclass(frozen=True, slots=True)
class Host:
    """`root` is what the clients take for /, `site` the server that they are to ask."""

    site: Site
    root: Path

    def has(self, program: str, directory: str) -> bool:
        """Whether a client is here: its program, or what it is configured by."""
        here = self.root == Path("/") and shutil.which(program) is not None
        return here or self.path(directory).is_dir()

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: Path) -> str | None:
        """None if it is not there.  Raises Broken."""
        try:
            return path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            raise Broken("it is not UTF-8") from None
        except OSError as error:
            raise Broken(f"it cannot be read: {cause(error)}") from None

    def toml(self, path: Path) -> dict[str, Any] | None:
        """None if it is not there.  Raises Broken."""
        text = self.read(path)
        try:
            return None if text is None else tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise Broken(f"it is not TOML: {error}") from None

    def setup(self, client: str) -> str:
        """What to do where the configuration is to be as we would have it."""
        more = "" if self.site.bypass else " --no-bypass"
        return f"entrepot setup {client} --url {self.site.base}{more} --write"

    def goes_past(self, client: str, message: str, advice: str = "") -> Check:
        """What does not go through the server when that fails: well, where it may."""
        if self.site.bypass:
            return ok("bypass", client, message)
        return failed("bypass", client, message, advice or self.setup(client))

    def leaves_out(self, client: str, names: list[str], advice: str, every: bool = False) -> Check:
        """Registries that are asked directly, always; `every` one, if the client does not know the server."""
        message = f"{', '.join(names)}: asked directly, past the server"
        make = warning if self.site.bypass and not every else failed
        return make("namespaces", client, message, advice)


def origin(text: str, scheme: str = "https") -> URL | None:
    """Of a URL, or of a host without a scheme; None for what is neither."""
    try:
        return URL(text if "://" in text else f"{scheme}://{text}").origin()
    except ValueError:
        return None
