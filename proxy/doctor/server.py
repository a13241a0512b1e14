"""The checks of the server's machine: configuration, disk, bucket, processes, upstreams."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from yarl import URL

from proxy.config.advice import advise
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.registry_hosts import EVERY
from proxy.config.schema import Config, NamespaceConfig
from proxy.config.settings import Setting
from proxy.config.upstream import UpstreamConfig
from proxy.doctor import bucket, database, disk, extensions, peers, running, upstreams
from proxy.doctor.checks import Check, failed, guarded, ok, warning
from proxy.extensions.extension import Extensions


async def examine(
    path: Path | None, admin: URL | None = None, settings: Sequence[Setting] = ()
) -> list[Check]:
    """All checks, with the configuration at `path`.  `admin` replaces its admin address."""
    subject = str(path or "built-in")
    try:
        config = load(path, settings=settings)
    except ConfigError as error:
        # All other checks need it.
        return [
            failed(
                "configuration",
                subject,
                str(error),
                "compare config.example.yml; entrepot check shows this error alone",
            )
        ]
    checks = [ok("configuration", subject, "is valid")]
    checks += [warning("configuration", each.path, each.surprise, each.remedy) for each in advise(config)]
    loaded = Extensions(config.extensions)
    try:
        return [*checks, *await _examine(config, admin, loaded)]
    finally:
        await loaded.close()


async def _examine(config: Config, admin: URL | None, loaded: Extensions) -> list[Check]:
    checks = list(await guarded("extension", "-", extensions.check(config, loaded)))
    private = config.disk.path / "private" if config.hosted() else None
    local = await asyncio.gather(
        guarded("disk", str(config.disk.path), asyncio.to_thread(disk.check, config.disk)),
        guarded("bucket", str(config.shared.bucket), bucket.check(config.shared, private)),
        guarded("database", "-", asyncio.to_thread(database.check, config)),
        guarded("tls", str(config.listen), asyncio.to_thread(running.check_certificate, config)),
        guarded("workers", "-", asyncio.to_thread(running.check_limits, config)),
        guarded("server", str(config.listen), running.check(config, admin)),
        guarded("peers", "-", peers.check(config)),
        guarded("issuer", "-", _issuers(config)),
    )
    checks += [each for found in local for each in found]
    return checks + await _upstreams(config, loaded)


async def _issuers(config: Config) -> list[Check]:
    if not config.access.oidc:
        return []
    from proxy.doctor import issuers  # here: what it needs is needed for nothing else

    return await issuers.check(config.access.oidc)


async def _upstreams(config: Config, loaded: Extensions) -> list[Check]:
    contacted = {}
    checks: list[Check] = []
    for name, (namespace, upstream) in asked_of(config).items():
        if config.offline or namespace.offline:
            checks.append(ok("upstream", name, "is offline, so it is never asked"))
        else:
            contacted[name] = upstream
    ahead: list[float] = []

    async def ask(name: str, upstream: UpstreamConfig) -> list[Check]:
        answered, clocks = await upstreams.check(name, upstream, loaded)
        ahead.extend(clocks)
        return answered

    asked = (guarded("upstream", name, ask(name, each)) for name, each in contacted.items())
    for each in await asyncio.gather(*asked):
        checks += each
    return [*checks, upstreams.check_clock(ahead)] if contacted else checks


def asked_of(config: Config) -> dict[str, tuple[NamespaceConfig, UpstreamConfig]]:
    """The caches whose upstreams are known: of the namespace `*`, the hosts that it lists by full names."""
    named = [each for each in config.cached() if each != EVERY]
    listed = [each.text for each in (config.others.hosts if config.others else ()) if each.literal]
    found = {name: config.namespace(name) for name in [*named, *listed]}
    return {name: (each, each.upstream) for name, each in found.items() if each and each.upstream}
