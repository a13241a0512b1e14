"""The checks of the database that servers share."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from proxy.config.quantities import format_duration
from proxy.config.schema import Config
from proxy.config.shared import CACHES
from proxy.doctor.checks import Check, failed, ok, warning
from storage.errors import StorageFailed

if TYPE_CHECKING:
    from storage.postgres.examination import Examination

OLDEST = 13  # the major version of PostgreSQL
MAX_SKEW = 5.0  # seconds


def check(config: Config) -> list[Check]:
    """All checks of the database; none without one.  Blocks."""
    if config.shared.records is None:
        return []
    try:
        from storage.postgres.examination import examine  # only here, as it needs the client of the database
    except ImportError as error:
        return [failed("database", "-", f"shared.records needs psycopg: {error}", "install entrepot[fleet]")]
    try:
        found = examine(config.shared.records)
    except StorageFailed as error:
        advice = "look whether it runs, and at the host, user and password of shared.records"
        return [failed("database", "-", str(error), advice)]
    checks = [_tables(found, found.name, "SCHEMA")]
    needed = (config.processes() + 1) * config.shared.connections
    if config.shared.caches is not None:
        needed *= 2
        with suppress(StorageFailed):  # it has just answered
            part = examine(config.shared.records, CACHES)
            checks.append(_tables(part, f"{found.name} ({CACHES})", "DATABASE"))
    return checks + _settings(found, needed)


def _tables(found: Examination, name: str, place: str) -> Check:
    """Whether it has the tables, or they can be made; `place` is where that needs a right."""
    tables = f"schema {found.schema}" if found.schema else "no tables yet"
    if found.major < OLDEST:
        return failed("database", name, f"is PostgreSQL {found.version}", f"use {OLDEST} or later")
    if found.schema > found.known:
        message = f"has schema {found.schema}, and this version knows schema {found.known}"
        return failed("database", name, message, "use the version of entrepot that made it, or a later one")
    if found.schema < found.known and not found.creates:
        advice = f"give its user the right to create tables: GRANT CREATE ON {place}"
        return failed("database", name, f"has {tables}, and tables cannot be made", advice)
    return ok("database", name, f"PostgreSQL {found.version}, {tables}")


def _settings(found: Examination, needed: int) -> list[Check]:
    """What is wrong with its settings; `needed` is how many connections this server has up to."""
    name, checks = found.name, []
    if not found.durable:
        message = "loses or damages what was pushed in a power failure"
        checks.append(warning("durability", name, message, "set fsync and full_page_writes to on"))
    if found.connections < needed:
        message = f"takes {found.connections} connections, and this server has up to {needed}"
        advice = "raise max_connections, or lower shared.connections"
        checks.append(warning("connections", name, message, advice))
    if abs(found.ahead) > MAX_SKEW:
        which = "ahead of" if found.ahead > 0 else "behind"
        message = f"its clock is {format_duration(abs(found.ahead))} {which} this machine's"
        advice = "synchronize both by NTP: the age of content decides what is collected"
        checks.append(warning("clock", name, message, advice))
    return checks
