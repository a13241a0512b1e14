"""A client's machine: its files, and checks that all kinds of clients share."""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarl import URL

from proxy.connections.failures import reason
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.setup.site import Site


class InvalidFile(Exception):
    """A file cannot be read or parsed.  The message is half a sentence."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine whose clients should use the server `site`; `root` is the root directory of the clients."""

    site: Site
    root: Path

    def has(self, program: str, directory: str) -> bool:
        """Whether a client is installed: its program or its configuration directory exists."""
        in_path = self.root == Path("/") and shutil.which(program) is not None
        return in_path or self.path(directory).is_dir()

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: Path) -> str | None:
        """The content, or None if the file does not exist.  Raises InvalidFile."""
        try:
            return path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            raise InvalidFile("it is not UTF-8") from None
        except OSError as error:
            raise InvalidFile(f"it cannot be read: {reason(error)}") from None

    def toml(self, path: Path) -> dict[str, Any] | None:
        """The content, or None if the file does not exist.  Raises InvalidFile."""
        text = self.read(path)
        try:
            return None if text is None else tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidFile(f"it is not TOML: {error}") from None

    def setup_command(self, client: str) -> str:
        """The command that installs the configuration of a client."""
        more = "" if self.site.bypass else " --no-bypass"
        return f"entrepot setup {client} --url {self.site.base}{more} --write"

    def bypass_check(self, client: str, message: str, advice: str = "") -> Check:
        """A check of requests that bypass the server if that fails; ok if a bypass is allowed."""
        if self.site.bypass:
            return ok("bypass", client, message)
        return failed("bypass", client, message, advice or self.setup_command(client))

    def left_out_check(self, client: str, names: list[str], advice: str, every: bool = False) -> Check:
        """A check of registries that a client always asks directly; `every` if it never uses the server."""
        message = f"{', '.join(names)}: asked directly, without the server"
        make = warning if self.site.bypass and not every else failed
        return make("namespaces", client, message, advice)


def origin(text: str) -> URL | None:
    """The origin of a URL, or of a host without a scheme; None for other text."""
    try:
        return URL(text if "://" in text else f"https://{text}").origin()
    except ValueError:
        return None
