"""The checks of the server's machine: configuration, disk, processes, upstreams."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from yarl import URL

from proxy.config.advice import advise
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.config.settings import Setting
from proxy.doctor import disk, running, upstreams
from proxy.doctor.checks import Check, failed, ok, warning


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
    local = await asyncio.gather(
        asyncio.to_thread(disk.check, config.disk),
        asyncio.to_thread(running.check_certificate, config),
        asyncio.to_thread(running.check_limits, config),
        running.check(config, admin),
    )
    checks += [each for found in local for each in found]
    return checks + await _upstreams(config)


async def _upstreams(config: Config) -> list[Check]:
    contacted = {}
    checks = []
    for name, (namespace, upstream) in config.cached().items():
        if config.offline or namespace.offline:
            checks.append(ok("upstream", name, "is offline, so it is never asked"))
        else:
            contacted[name] = upstream
    found = await asyncio.gather(*(upstreams.check(name, each) for name, each in contacted.items()))
    ahead = []
    for each, clocks in found:
        checks += each
        ahead += clocks
    return [*checks, upstreams.check_clock(ahead)] if contacted else checks
