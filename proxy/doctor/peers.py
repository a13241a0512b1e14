"""The checks of the other replicas of a fleet: who they are, and whether they take this one for a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version

import msgspec
from yarl import URL

from proxy.config.schema import Config
from proxy.doctor.checks import Check, check_skew, failed, ok, warning
from proxy.upstream.fleet import connect_to_peers, membership_of
from proxy.upstream.peers import PEER, UNNAMED, secrets_of
from proxy.upstream.replicas import STATE, FleetRequest, NotThere, ReplicaClient, ReplicaState, Unanswered
from proxy.upstream.transport import Transport
from storage.errors import RegistryError

MAX_SKEW = 5.0  # seconds between two clocks
TIMEOUT = 5.0  # seconds for the answer of a replica about itself


async def check(config: Config, clock: Callable[[], float] = time.time) -> list[Check]:
    """All checks of the fleet; none without `peers:`.  Raises OSError if its certificates cannot be read."""
    if config.peers is None:
        return []
    membership = membership_of(config)
    try:
        await membership.refresh()
        urls, own = membership.urls, membership.own
    finally:
        await membership.close()
    subject = ":".join(map(str, config.peers.dns)) if config.peers.dns else "peers.urls"
    if not urls:
        advice = "check the name servers of this machine, and peers.dns"
        return [failed("peers", subject, "has no address, so no other replica is known", advice)]
    checks = [_check_own(subject, urls, own)]
    asked = (_check_peer(config, url, own, clock) for url in urls if url != own)
    for each in await asyncio.gather(*asked):
        checks += each
    return checks


def _check_own(subject: str, urls: Sequence[str], own: str | None) -> Check:
    known = f"has {len(urls)} replicas"
    if own is None:
        advice = "set peers.self to the URL by which the others reach it"
        return failed("peers", subject, f"{known}, and it is unknown which of them is this one", advice)
    if own not in urls:
        advice = "check peers.self; it may also be that this replica is not ready yet"
        return warning("peers", subject, f"{known}, and {own}, which is this one, is none of them", advice)
    return ok("peers", subject, f"{known}; this one is {own}")


async def _check_peer(config: Config, url: str, own: str | None, clock: Callable[[], float]) -> list[Check]:
    assert config.peers is not None
    transport = Transport("peers", connect_to_peers(config), URL(url))
    try:
        headers = secrets_of(own, config.peers.secret)
        response = await transport.send("GET", URL(f"{url}/v2/"), headers)
        now = clock()
        response.release()
    except RegistryError as error:
        advice = "start it, or check the network; until it answers, it is left out"
        return [warning("peer", url, str(error), advice)]
    finally:
        await transport.close()
    called = response.headers.get(PEER)
    if called is None:
        advice = "give all replicas the same peers.secret, and the same version"
        return [failed("peer", url, "does not take this server for a replica", advice)]
    if called == UNNAMED:
        found = warning("peer", url, "does not know which replica it is", "set its peers.self")
    elif called != url:
        advice = "set its peers.self to the URL by which it is reached"
        found = warning(
            "peer", url, f"calls itself {called}, so it does not own what others ask it for", advice
        )
    else:
        found = ok("peer", url, "takes the secret")
    clocks = _check_clock(url, response.headers.get("Date", ""), now)
    return [found, *await _check_state(config, url, own), *clocks]


async def _check_state(config: Config, url: str, own: str | None) -> list[Check]:
    """What is wrong with another replica, as it says itself."""
    assert config.peers is not None
    client = ReplicaClient(connect_to_peers(config), partial(secrets_of, own, config.peers.secret))
    read = partial(msgspec.json.decode, type=ReplicaState)
    try:
        state = await client.ask(url, FleetRequest(STATE, sender=own or UNNAMED), read, TIMEOUT)
    except (Unanswered, NotThere) as error:
        advice = "until it is right, commands do not speak for it: compare its log and its version"
        return [warning("replica", url, str(error), advice)]
    finally:
        await client.close()
    found, ours = [], version("entrepot")
    if state.version != ours:
        advice = "use one version, except while replicas are replaced one by one"
        found.append(warning("version", url, f"has version {state.version}, and this one has {ours}", advice))
    if (status := state.health.get("status")) != "ready":
        why = "; ".join(each for name, each in state.health.items() if name != "status")
        advice = "run entrepot doctor there"
        found.append(warning("replica", url, f"is {status}{f': {why}' if why else ''}", advice))
    return found


def _check_clock(url: str, date: str, now: float) -> list[Check]:
    try:
        ahead = parsedate_to_datetime(date).timestamp() + 0.5 - now  # Date has whole seconds
    except (ValueError, OverflowError):
        return []
    return check_skew(url, ahead, MAX_SKEW)
