"""The section `redirect`: blobs that clients fetch from the bucket themselves."""

from __future__ import annotations

import re
from typing import Annotated

from proxy.config.fields import Section, Size, Timeout
from proxy.config.hosts import parse_url
from proxy.config.values import parse_pattern

LONGEST = 7 * 86400.0  # seconds for which S3 and Google take a signed URL


class RedirectConfig(Section, frozen=True):
    """Which blobs are answered by a redirect to the bucket.

    above: those of more bytes
    endpoint: the URL of the bucket's service for clients, by default that of `shared`
    valid_for: seconds for which the URL is valid
    never_for: patterns of the User-Agent of clients that cannot follow it
    """

    above: Size
    endpoint: Annotated[str | None, parse_url] = None
    valid_for: Timeout = 1200.0
    never_for: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()

    def __post_init__(self) -> None:
        if self.valid_for > LONGEST:
            raise ValueError("valid_for is at most 7d: no bucket takes an older URL")
