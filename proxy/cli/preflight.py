"""What would keep a server from starting, or from working once it has started.

Looks at files, ports and the disk as the server does, and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from yarl import URL

from proxy.config.errors import StartError
from proxy.config.oidc import OIDCIssuer
from proxy.config.policy import PolicyConfig
from proxy.config.schema import Config
from proxy.config.upstream import UpstreamConfig
from proxy.connections.failures import file_fault
from proxy.connections.trust import shared_context
from proxy.doctor import disk


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is wrong, a line each: `errors` keep the server from starting, `warnings` do not."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect(config: Config) -> Preflight:
    """Look at all that the configuration names on this machine."""
    found = Preflight()
    for look in (_extensions, _tls, _access, _policy, _upstreams, _webhooks, _ports, _disk, _lists):
        look(config, found)
    return found


def _extensions(config: Config, found: Preflight) -> None:
    from proxy.extensions.extension import Extensions

    extensions = Extensions(config.extensions)
    for name in config.extensions:
        try:
            extensions.make(name)
        except StartError as error:
            found.errors.append(str(error))
    asyncio.run(extensions.close())


def _tls(config: Config, found: Preflight) -> None:
    from proxy.web.tls import Certificates

    if config.tls is not None:
        try:
            Certificates(config.tls)
        except StartError as error:
            found.errors.append(str(error))


def _access(config: Config, found: Preflight) -> None:
    from proxy.server.access import password_file, token_verifier

    async def open_users(path: Path) -> None:
        async with AsyncExitStack() as closing:
            password_file(path, closing)

    access = config.access
    try:
        if access.htpasswd is not None:
            asyncio.run(open_users(access.htpasswd))
    except StartError as error:
        found.errors.append(str(error))
    try:
        if access.token is not None:
            token_verifier(access.token, float)
    except StartError as error:
        found.errors.append(str(error))
    if access.oidc:
        asyncio.run(_issuers(access.oidc, found))


async def _issuers(issuers: Mapping[str, OIDCIssuer], found: Preflight) -> None:
    from proxy.access.key_sources import key_sources

    for name, issuer in issuers.items():
        try:
            for source in key_sources({name: issuer}).values():
                await source.close()
        except StartError as error:
            found.errors.append(str(error))


def _policy(config: Config, found: Preflight) -> None:
    from proxy.policy.coverage import unreachable
    from proxy.policy.rules import RuleBook

    for rule, before in unreachable(config.policy.rules):
        found.warnings.append(
            f"policy rule {rule.name} never decides: {before.name} matches all that it does"
        )

    try:
        RuleBook(_without_extensions(config.policy), time.time)
    except StartError as error:
        found.errors.append(str(error))


def _without_extensions(policy: PolicyConfig) -> PolicyConfig:
    """What was made of the conditions that are extensions is gone, and was looked at."""
    rules = tuple(msgspec.structs.replace(each, conditions=()) for each in policy.rules)
    return msgspec.structs.replace(policy, rules=rules)


def _upstreams(config: Config, found: Preflight) -> None:
    from proxy.extensions.extension import Extensions
    from proxy.upstream.configured import connect_of, credentials_of
    from storage.errors import OriginDenied

    for name, (_, upstream) in config.cached().items():
        path = f"namespaces.{name}.upstream"
        unreadable = [f"{path}.{each}" for each in _unreadable(upstream)]
        found.errors.extend(unreadable)
        if not unreadable:
            try:
                connect_of(upstream).ssl_context()
            except OSError as error:
                files = ", ".join(str(file) for _, file in _files(upstream))
                found.errors.append(f"{path}: {files}: {file_fault(error)}")
        for login in upstream.logins() if upstream.extension is None else ():
            # A program or an extension is asked when the server needs it.
            if login.credential_helper is None and login.credential_provider is None:
                try:
                    asyncio.run(credentials_of(login, Extensions({})).get(_authority(upstream)))
                except OriginDenied as error:
                    found.warnings.append(f"{path}: {error}")


def _authority(upstream: UpstreamConfig) -> str:
    """The host for which the credentials of an upstream are; of those of `*`, one of them."""
    return URL(upstream.url[0]).authority if upstream.url else upstream.hosts[0].text


def _files(upstream: UpstreamConfig) -> Iterator[tuple[str, Path]]:
    for key in ("ca_file", "client_certificate", "client_key"):
        file = getattr(upstream, key)
        if file is not None:
            yield key, file


def _unreadable(upstream: UpstreamConfig) -> Iterator[str]:
    for key, file in _files(upstream):
        try:
            file.read_bytes()
        except OSError as error:
            yield f"{key}: {file}: {file_fault(error)}"


def _webhooks(config: Config, found: Preflight) -> None:
    for number, each in enumerate(config.webhooks):
        try:
            shared_context(each.ca_file)
        except OSError as error:
            found.errors.append(f"webhooks[{number}].ca_file: {each.ca_file}: {file_fault(error)}")


def _ports(config: Config, found: Preflight) -> None:
    from proxy.web.sockets import bind

    for key, address in config.listeners().items():
        try:
            for each in bind(address, key):
                each.close()
        except StartError as error:
            if getattr(error.__cause__, "errno", None) == errno.EADDRINUSE:
                hint = "if it is not this server, choose another port"
                found.warnings.append(f"{key}: something listens at {address} already: {hint}")
            else:
                found.errors.append(str(error))


def _disk(config: Config, found: Preflight) -> None:
    # A server whose disk is full or read-only still serves what is stored there.
    stored = any((config.disk.path / kind).is_dir() for kind in ("cache", "private"))
    mild = [os.strerror(each) for each in (errno.EROFS, errno.ENOSPC, errno.EDQUOT)] if stored else []
    for each in disk.check(config.disk):
        if each.state == "failed":
            lines = found.warnings if any(cause in each.message for cause in mild) else found.errors
            lines.append(f"disk.path: {each.subject} {each.message}: {each.advice}")


def _lists(config: Config, found: Preflight) -> None:
    for number, rule in enumerate(config.warm):
        if rule.list is not None:
            try:
                rule.list.read_bytes()
            except OSError as error:
                found.warnings.append(f"warm[{number}].list: {rule.list}: {file_fault(error)}")
