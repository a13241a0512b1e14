"""The audit log as an operator reads it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import msgspec

from proxy.admin.activity_reports import AuditRow
from proxy.config.audit import AuditConfig
from proxy.telemetry.audit import AuditRecord
from proxy.telemetry.audit_reader import last_records
from storage.errors import StorageFailed, Unsupported


def audit_rows(config: AuditConfig | None, match: str, limit: int) -> list[AuditRow]:
    """The last `limit` acts whose values contain all words of `match`, the latest first.

    Blocks; raises Unsupported if no audit log is written, StorageFailed if it cannot be read.
    """
    if config is None:
        raise Unsupported("acts are not recorded: set audit.file")
    rows: list[AuditRow] = []
    try:
        for each in _matching(last_records(config), match.casefold().split()):
            rows.append(_row(each))
            if len(rows) == limit:
                break
    except OSError as error:
        raise StorageFailed(f"{config.file}: {error.strerror or error}") from error
    return rows


def _matching(records: Iterator[AuditRecord], words: list[str]) -> Iterator[AuditRecord]:
    for each in records:
        values = [*msgspec.structs.asdict(each).values(), f"{each.repository}:{each.reference}"]
        text = msgspec.json.encode(values).decode().casefold()
        if all(word in text for word in words):
            yield each


def _row(record: AuditRecord) -> AuditRow:
    fields = msgspec.structs.asdict(record)
    at = datetime.fromisoformat(fields.pop("time")).timestamp()
    return AuditRow(at=at, **{**fields, "arguments": dict(record.arguments)})
