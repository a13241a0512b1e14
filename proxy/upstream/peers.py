"""The other replicas of a fleet as upstreams: each digest and each repository has an owner, asked first.

- The owner of a key is asked before the upstream, by those whose score for the key is lower.  It answers from
  its own cache and upstreams: what another replica asks for is never asked of a third one.
- A replica does not answer who has a higher score.  So no two wait for each other, whatever lists they have.
- A blob belongs to the owner of its digest.  Manifests, tags and listings belong to the owner of their
  repository: who has asked for a tag has the manifest, too.
- A response counts only if the owner has the same upstream and the same rules for tags, and may ask now: then
  its "unknown" is that of the upstream.  Any other answer is none, and the upstream is asked.
- If the upstream cannot be asked, all replicas are asked for what they have stored.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence

from proxy.config.quantities import parse_number
from proxy.telemetry.exchange import current, origin_age, past_owners
from proxy.upstream.breaker import HostState
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.membership import Membership
from proxy.upstream.messages import PeerLink
from proxy.upstream.rendezvous import ranked, score
from proxy.upstream.shared_limits import Namer, SharedLimits
from storage.errors import Misdirected, OriginFailed

PEER, SECRET = "Entrepot-Peer", "Entrepot-Secret"  # of requests: who asks; the first also of responses
ORIGIN, KNOWN = "Entrepot-Origin", "Entrepot-Known"  # see Owners
UNNAMED = "-"  # a replica that does not know its own URL
FORMER = 600.0  # seconds after which connections to a replica that is gone are closed
HOLDERS = 8  # replicas that are asked for what they have stored, if the upstream cannot be asked
ASKED = 2  # replicas that are asked before an upstream: the owner, and whoever owns the key without that one


def secrets_of(own: str | None, secret: str) -> Mapping[str, str]:
    """The headers of every request of the replica `own` to another one."""
    return {PEER: own or UNNAMED, SECRET: secret}


class Peers:
    """The replicas of a fleet, for one event loop.

    make: the registry of a replica at a URL
    """

    def __init__(
        self,
        membership: Membership,
        secret: str,
        make: Callable[[str], UpstreamRegistry],
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.namer = Namer(secret)
        self._membership = membership
        self._secret = secret
        self._make = make
        self._ticks = ticks
        self._made: dict[str, UpstreamRegistry] = {}
        self._views: dict[str, dict[PeerLink, UpstreamRegistry]] = {}  # by URL
        self._gone: dict[str, float] = {}  # since when a replica that was asked is none any more
        self._closing: set[asyncio.Task[None]] = set()
        self._owners: dict[str, Owners] = {}

    @property
    def own(self) -> str | None:
        """The URL of this replica, None while it is unknown."""
        return self._membership.own

    async def known(self) -> tuple[str, ...]:
        """The URLs of all replicas."""
        await self._membership.refresh()
        self._drop_former(self._membership.urls)
        return self._membership.urls

    async def owner(self, key: str) -> str | None:
        """The URL of the owner of a key; None without replicas."""
        return next(iter(ranked(key, await self.known())), None)

    async def before(self, key: str) -> list[str]:
        """Those that are asked for the key before this replica asks its upstream.

        One that is known to fail gives its place to the next: all who know that agree on it.
        """
        order = ranked(key, await self.known())
        if self.own in order:
            order = order[: order.index(self.own)]
        healthy = [each for each in order if self._registry(each).healthy]
        failing = [each for each in order if each not in healthy]
        return [*healthy[:ASKED], *failing]

    async def holders(self, key: str) -> list[str]:
        """The other replicas that are not asked for the key before the upstream, as far as they answer."""
        asked = [*await self.before(key), self.own]
        others = [each for each in ranked(key, self._membership.urls) if each not in asked]
        return [each for each in others if self._registry(each).healthy][:HOLDERS]

    def of(self, url: str, namespace: str, link: PeerLink) -> UpstreamRegistry:
        """The registry of a namespace of another replica, always the same for a link."""
        views = self._views.setdefault(url, {})
        if link not in views:
            views[link] = self._registry(url).as_peer(namespace, link)
        return views[link]

    def _registry(self, url: str) -> UpstreamRegistry:
        if url not in self._made:
            self._made[url] = self._make(url)
        return self._made[url]

    def state(self) -> list[HostState]:
        """The state of the other replicas that were asked."""
        return [each.state()[0] for url, each in self._made.items() if url in self._membership.urls]

    def _drop_former(self, urls: Sequence[str]) -> None:
        """Close what led to replicas that have been gone for long; transfers from them end by themselves."""
        now = self._ticks()
        for url in [each for each in self._gone if each in urls]:
            del self._gone[url]
        for url in [each for each in self._made if each not in urls]:
            if now - self._gone.setdefault(url, now) >= FORMER:
                del self._gone[url]
                self._views.pop(url, None)
                closing = asyncio.create_task(self._made.pop(url).close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    # Requests of other replicas

    async def sender(self, headers: Mapping[str, str]) -> str | None:
        """The URL of the replica that has sent a request with these headers; None: it is of a client."""
        secret = headers.get(SECRET)
        if secret is None or not hmac.compare_digest(
            secret.encode("utf-8", "replace"), self._secret.encode()
        ):
            return None
        await self.known()
        return headers.get(PEER, UNNAMED)

    def admit(self, peer: str, namespace: str, repository: str, digest: str | None) -> None:
        """Raise Misdirected if this replica does not answer that one, which might be waiting for it."""
        key = digest or f"{namespace}/{repository}"
        if self.own is None:
            raise Misdirected("this replica does not know which of the peers it is: set peers.self")
        if peer != UNNAMED and score(key, peer) >= score(key, self.own):
            raise Misdirected(f"{self.own} is asked for {key} after {peer}")

    def hear(self, namespace: str, headers: Mapping[str, str]) -> None:
        """Learn what another replica tells of the upstream of a namespace."""
        if (owners := self._owners.get(namespace)) is not None:
            owners.learn(headers)

    def headers(self, namespace: str = "") -> Mapping[str, str]:
        """Those of a response to another replica, for content of a namespace."""
        own = {PEER: self.own or UNNAMED}
        owners = self._owners.get(namespace)
        return own if owners is None else {**own, **owners.told()}

    def secrets(self) -> Mapping[str, str]:
        """The headers of every request to another replica."""
        return secrets_of(self.own, self._secret)

    # Parts

    def owners(
        self,
        namespace: str,
        rules: object,
        upstreams: Sequence[UpstreamRegistry],
        offline: Callable[[], bool],
    ) -> Owners:
        """The owners of what is in a namespace; `rules` are equal where responses mean the same."""
        origin = self.namer.name(namespace, rules)
        made = self._owners[namespace] = Owners(self, namespace, origin, upstreams, offline)
        return made

    def forget(self, namespace: str, owners: Owners, links: Sequence[PeerLink]) -> None:
        """The namespace is no longer served, unless by other `owners`."""
        if self._owners.get(namespace) is owners:
            del self._owners[namespace]
        for views in self._views.values():
            for each in links:
                views.pop(each, None)

    async def close(self) -> None:
        await self._membership.close()
        await asyncio.gather(*self._closing)
        for each in self._made.values():
            await each.close()


class Owners:
    """Who is asked for content of a namespace before its upstreams.

    origin: a name for the upstreams and the rules that apply to what they say
    offline: whether the upstreams must not be asked now
    """

    def __init__(
        self,
        peers: Peers,
        namespace: str,
        origin: str,
        upstreams: Sequence[UpstreamRegistry],
        offline: Callable[[], bool],
    ) -> None:
        self._peers = peers
        self._namespace = namespace
        self._origin = origin
        self._upstreams = upstreams
        self._offline = offline
        self._stored = _StoredOnly(self)

    async def of(self, repository: str, digest: str | None) -> list[UpstreamRegistry]:
        """In the order in which to ask them; none for what another replica asks for, or who wants news."""
        if current().peer or past_owners.get():
            return []
        urls = await self._peers.before(digest or f"{self._namespace}/{repository}")
        return [self._peers.of(each, self._namespace, self) for each in urls]

    async def holders(self, repository: str, digest: str | None) -> list[UpstreamRegistry]:
        """Others, which are asked for what they have stored; none for what another replica asks for."""
        if current().peer:
            return []
        urls = await self._peers.holders(digest or f"{self._namespace}/{repository}")
        return [self._peers.of(each, self._namespace, self._stored) for each in urls]

    def close(self) -> None:
        self._peers.forget(self._namespace, self, [self, self._stored])

    def told(self) -> Mapping[str, str]:
        """What this replica tells others of the namespace."""
        known = {KNOWN: self._known().encode()}
        return known if self._offline() else {ORIGIN: self._origin, **known}

    def _known(self) -> SharedLimits:
        told = [each.known.tell(self._peers.namer) for each in self._upstreams]
        return SharedLimits(
            {name: each for one in told for name, each in one.circuits.items()},
            {name: each for one in told for name, each in one.budgets.items()},
        )

    def learn(self, headers: Mapping[str, str]) -> None:
        limits = SharedLimits.parse(headers.get(KNOWN, ""))
        if limits.circuits or limits.budgets:
            for each in self._upstreams:
                each.known.learn(limits, self._peers.namer)

    # PeerLink

    def headers(self) -> Mapping[str, str]:
        return {**self._peers.secrets(), KNOWN: self._known().encode()}

    def check(self, headers: Mapping[str, str]) -> None:
        if headers.get(ORIGIN) != self._origin:
            why = (
                "has another configuration, or is offline" if PEER in headers else "does not take the secret"
            )
            raise OriginFailed(f"the replica {why}, for {self._namespace}")
        self.learn(headers)
        origin_age.set(float(parse_number(headers.get("Age", "")) or 0))


class _StoredOnly:
    """A PeerLink to replicas that ask nobody for what they have not stored."""

    def __init__(self, link: PeerLink) -> None:
        self._link = link

    def headers(self) -> Mapping[str, str]:
        return {**self._link.headers(), "Cache-Control": "only-if-cached"}  # RFC 9111, section 5.2.1.7

    def check(self, headers: Mapping[str, str]) -> None:
        self._link.check(headers)
