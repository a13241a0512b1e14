"""The audit log: who did what, when, and with which result.

It holds no credentials, no header but User-Agent, no query, and no user name that was not verified, which may
be a password in the wrong field.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from proxy.config.audit import AuditConfig, AuditKind
from proxy.config.errors import StartError
from proxy.telemetry.audit_file import AuditFile
from proxy.telemetry.exchange import UNKNOWN, Exchange

AGENT = 200  # characters of a User-Agent that are recorded
_READ = ("manifest", "blob", "tags", "referrers", "catalog")
_UPLOADS = ("uploads", "upload")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # it may be written later
# A password in a URL, which somebody may give as the name of an image, or in a reason.
_USERINFO = re.compile(rb'(?<=://)[^/\s"]*@')
_encode = msgspec.json.Encoder(enc_hook=str).encode


class AuditRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of the audit log; docs/operations.md describes the keys."""

    time: str
    kind: AuditKind
    result: str
    status: int
    user: str = ""
    address: str = ""
    agent: str = ""
    method: str = ""
    object: str = ""
    repository: str = ""
    reference: str = ""
    digest: str = ""
    code: str = ""
    rule: str = ""
    mode: str = ""
    reason: str = ""
    operation: str = ""
    arguments: Mapping[str, Any] = msgspec.field(default_factory=dict)
    id: str = ""


class AuditLog:
    """Records acts of the kinds that the configuration lists.  Raises StartError if the file is not usable.

    A disk that is full or fails is no reason not to start.
    """

    def __init__(self, config: AuditConfig, clock: Callable[[], float] = time.time) -> None:
        self._kinds = frozenset(config.kinds)
        self._clock = clock
        self._file = AuditFile(config.file, config.max_size, config.keep)
        try:
            self._file.open()
        except OSError as error:
            if error.errno not in _FULL:
                reason = error.strerror or str(error)
                raise StartError(f"audit.file: cannot write {config.file}: {reason}") from None

    def served(self, exchange: Exchange, status: int) -> None:
        """Record what a client's request did, once it has ended.  Raises nothing."""
        for verdict in exchange.verdicts:
            if (kind := "override" if verdict.mode == "override" else "policy") in self._kinds:
                self._write(self._request(kind, exchange, status, verdict.rule, verdict.mode, verdict.reason))
        kind = "login" if exchange.refused else _act(exchange.method, exchange.kind, status)
        if kind in self._kinds:
            why = exchange.reason if kind == "login" else ""
            self._write(self._request(kind, exchange, status, reason=why))

    def administered(
        self,
        kind: AuditKind,
        address: str,
        agent: str,
        method: str,
        operation: str,
        arguments: Mapping[str, Any],
        status: int,
    ) -> None:
        """Record a request to the admin API, once it has ended.  Raises nothing."""
        if kind in self._kinds:
            self._write(
                AuditRecord(
                    time=self._now(),
                    kind=kind,
                    result=_result(status),
                    status=status,
                    address=address,
                    agent=agent[:AGENT],
                    method=method,
                    operation=operation,
                    arguments=arguments,
                )
            )

    def close(self) -> None:
        self._file.close()

    def _request(
        self, kind: Any, exchange: Exchange, status: int, rule: str = "", mode: str = "", reason: str = ""
    ) -> AuditRecord:
        known = exchange.namespace != UNKNOWN
        uploads = exchange.kind in _UPLOADS
        content = exchange.content
        return AuditRecord(
            time=self._now(),
            kind=kind,
            result=_result(status),
            status=status,
            user=exchange.user,
            address=exchange.client,
            agent=(exchange.agent or "")[:AGENT],
            method=exchange.method,
            object="blob" if uploads else exchange.kind,
            repository=f"{exchange.namespace}/{exchange.repository}" if known else "",
            # Whoever knows the id of an upload can continue it.
            reference="" if uploads else exchange.reference,
            digest=exchange.digest or (str(content.digest) if content is not None else ""),
            code=exchange.detail,
            rule=rule,
            mode=mode,
            reason=reason,
            id=exchange.id,
        )

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat().replace("+00:00", "Z")

    def _write(self, record: AuditRecord) -> None:
        try:
            line = _encode(record)
        except UnicodeEncodeError:  # a client's header that is not UTF-8: json is slower, but escapes it
            line = json.dumps(msgspec.to_builtins(record, enc_hook=str)).encode()
        self._file.append(_USERINFO.sub(b"***@", line))


def _act(method: str, kind: str, status: int) -> str:
    """The kind of a request; "" for a ping, and for a step of an upload that goes well."""
    if kind == "token":
        return kind
    if kind in _UPLOADS:
        return "" if status in (202, 204) else "push"
    if method in ("GET", "HEAD"):
        return "pull" if kind in _READ else ""
    if kind not in ("manifest", "blob"):
        return ""
    return "delete" if method == "DELETE" else "push"


def _result(status: int) -> str:
    if status < 400:
        return "done"
    return "refused" if status in (401, 403, 429) else "failed"
