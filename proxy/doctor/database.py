"""The checks of the database that servers share."""

from __future__ import annotations

from proxy.config.quantities import format_duration
from proxy.config.schema import Config
from proxy.doctor.checks import Check, failed, ok, warning
from storage.errors import StorageFailed

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
    name, tables = found.name, f"schema {found.schema}" if found.schema else "no tables yet"
    if found.major < OLDEST:
        first = failed("database", name, f"is PostgreSQL {found.version}", f"use {OLDEST} or later")
    elif found.schema > found.known:
        message = f"has schema {found.schema}, and this version knows schema {found.known}"
        first = failed("database", name, message, "use the version of entrepot that made it, or a later one")
    elif found.schema < found.known and not found.creates:
        advice = "give its user the right to create tables: GRANT CREATE ON SCHEMA"
        first = failed("database", name, f"has {tables}, and tables cannot be made", advice)
    else:
        first = ok("database", name, f"PostgreSQL {found.version}, {tables}")
    checks = [first]
    if not found.durable:
        message = "loses or damages what was pushed in a power failure"
        checks.append(warning("durability", name, message, "set fsync and full_page_writes to on"))
    needed = (config.processes() + 1) * config.shared.connections
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
