"""The section `audit`: a file that says who did what."""

from __future__ import annotations

from typing import Annotated, Literal

from proxy.config.fields import File, Section, Size
from proxy.config.values import parse_count

AuditKind = Literal["pull", "push", "delete", "login", "token", "admin", "policy", "override"]


class AuditConfig(Section, frozen=True):
    """Which kinds of acts are recorded, and in which file.

    kinds: by default all but pulls and tokens, which are most of all requests, and are in the access log
    max_size: the bytes above which a new file is begun
    keep: how many former files are kept
    """

    file: File
    kinds: tuple[AuditKind, ...] = ("push", "delete", "login", "admin", "policy", "override")
    max_size: Size = 100 << 20
    keep: Annotated[int, parse_count] = 5

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("kinds is empty: name what is recorded, or remove the section audit")
