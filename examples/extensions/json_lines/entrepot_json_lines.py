"""An event sink: a file with an event on each line, which log shippers read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.extensions.protocols import EventSink


@dataclass
class LineSettings:
    """`sync`: whether an event is on the disk when it counts as taken."""

    file: Path
    sync: bool = True


class JSONLines(EventSink):
    """Opens the file for each event, so that it may be moved away at any time."""

    protocol = 1
    Settings = LineSettings

    def __init__(self, settings: LineSettings) -> None:
        if not settings.file.parent.is_dir():
            raise ValueError(f"file: {settings.file.parent} is not a directory")
        self._settings = settings

    async def send(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        with self._settings.file.open("ab", buffering=0) as file:
            file.write(line)
            if self._settings.sync:
                os.fsync(file)
