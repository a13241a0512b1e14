"""The types of the keys of the configuration, and the base of its sections.

Each type is `Annotated` with the function that parses its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from proxy.config.hosts import parse_host
from proxy.config.quantities import parse_duration, parse_freshness, parse_keep, parse_size, parse_timeout
from proxy.config.values import parse_flag, parse_path, parse_text

Text = Annotated[str, parse_text]
Flag = Annotated[bool, parse_flag]
File = Annotated[Path, parse_path]
Host = Annotated[str, parse_host]
Duration = Annotated[float, parse_duration]
Timeout = Annotated[float, parse_timeout]
Freshness = Annotated[float, parse_freshness]
Keep = Annotated[float, parse_keep]
Size = Annotated[int, parse_size]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the configuration file.  Durations are in seconds, sizes in bytes."""
