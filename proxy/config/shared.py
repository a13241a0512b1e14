"""What several servers share."""

from __future__ import annotations

from typing import Annotated

from proxy.config.fields import Section
from proxy.config.values import Secret, parse_count, parse_secret


def parse_database(value: object) -> Secret:
    """The URL of a PostgreSQL database; a Secret, since it may hold a password."""
    text = parse_secret(value)
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected postgresql://user:password@host:port/database")
    return text


class SharedConfig(Section, frozen=True):
    """What several servers share.

    records: the URL of a PostgreSQL database, for the records of the private registry
    connections: how many connections to it each process has at most
    """

    records: Annotated[Secret | None, parse_database] = None
    connections: Annotated[int, parse_count] = 4
