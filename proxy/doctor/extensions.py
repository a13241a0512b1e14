"""The checks of the extensions that the configuration names: whether each can be imported and made here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.doctor.checks import Check, failed, ok
from proxy.extensions.extension import Extensions


async def check(config: Config, extensions: Extensions) -> Sequence[Check]:
    """Make each of them; `extensions` has those that are sound then."""
    return [await asyncio.to_thread(_check, name, extensions) for name in config.extensions]


def _check(name: str, extensions: Extensions) -> Check:
    try:
        made = extensions.make(name)
    except StartError as error:
        advice = (
            "install or correct its package, or remove it from the configuration: the server does not start"
        )
        return failed("extension", name, str(error), advice)
    return ok("extension", name, f"{made.kind}, {made.installed}")
