"""The first screen: what is degraded, what is saved, what is stored, how upstreams are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from aiohttp import web

from proxy.admin.api.app import State
from proxy.admin.models import RepositoryRow, Stats, WebhookRow
from proxy.admin.operations import Operations
from proxy.admin.reports import UpstreamRow
from proxy.config.quantities import format_size
from proxy.ui.charts import ColumnChart, column_chart
from proxy.ui.rendering import Renderer, iso
from proxy.ui.snapshot import RepositorySnapshot
from storage.errors import RegistryError

DAYS = 14
PERIODS = {"24h": "a day", "7d": "a week", "30d": "30 days"}


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that an operator should know; `kind` is bad or fair."""

    kind: str
    subject: str
    sentence: str


@dataclass(frozen=True, slots=True)
class NamespaceRow:
    """What a namespace holds; `bytes` count what several of its repositories show once for each."""

    name: str
    repositories: int
    bytes: int


class OverviewScreen:
    """The state of the server, and what it saves."""

    def __init__(
        self,
        operations: Operations,
        state: State,
        repositories: RepositorySnapshot,
        renderer: Renderer,
        clock: Callable[[], float],
    ) -> None:
        self._operations = operations
        self._state = state
        self._repositories = repositories
        self._renderer = renderer
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        period = request.query.get("period", "7d")
        if period not in PERIODS:
            period = "7d"
        state, stats = await self._state(), await self._operations.stats(period)
        upstreams, webhooks = await self._operations.upstreams(), await self._operations.webhooks()
        rows, unread = await self._rows()
        return self._renderer.page(
            request,
            "overview.html",
            "Overview",
            state=state,
            notices=[*unread, *notices(state, upstreams, webhooks)],
            stats=stats,
            period=period,
            periods=PERIODS,
            traffic=traffic(stats, self._clock()),
            namespaces=by_namespace(rows),
            upstreams=upstreams,
        )

    async def _rows(self) -> tuple[Sequence[RepositoryRow], list[Notice]]:
        """The repositories; if they cannot be read, the rest of the screen is shown all the same."""
        try:
            return (await self._repositories.get()).repositories, []
        except RegistryError as error:
            return [], [Notice("bad", "The records", f"cannot be read: {error}")]


def notices(
    state: Mapping[str, str], upstreams: Sequence[UpstreamRow], webhooks: Sequence[WebhookRow]
) -> Iterator[Notice]:
    """What is degraded, the worst first."""
    if "store" in state:
        yield Notice("bad", "The disk", state["store"])
    if "extensions" in state:
        yield Notice("bad", "An extension", state["extensions"])
    for each in upstreams:
        if each.open:
            until = "" if each.until is None else f" until {iso(each.until)}"
            sentence = f"requests to {each.host} are paused{until}, since it failed: {each.error}"
            yield Notice("bad", each.namespace, sentence)
    for each in upstreams:
        for row in each.refused:
            sentence = f"{row.host} refused credential {row.credential} with status {row.status}"
            yield Notice("bad", each.namespace, sentence)
    for hook in webhooks:
        if hook.failing_since is not None:
            sentence = f"deliveries fail since {iso(hook.failing_since)}, {hook.pending} wait: {hook.error}"
            yield Notice("bad", f"Webhook {hook.name}", sentence)
    for each in upstreams:
        if each.limited_until is not None:
            sentence = f"the rate limit of {each.host} is used up until {iso(each.limited_until)}"
            yield Notice("fair", each.namespace, sentence)
    if "drill" in state:
        yield Notice("fair", "A drill", state["drill"])
    if state["status"] == "draining":
        yield Notice("fair", "The server", "is shutting down")


def traffic(stats: Stats, now: float) -> ColumnChart:
    """The bytes that clients got on each of the last days: what was fetched for them, and what was not."""
    known = {each.day: each for each in stats.days}
    today = datetime.fromtimestamp(now, UTC).date()
    bars = []
    for back in reversed(range(DAYS)):
        day = (today - timedelta(days=back)).isoformat()
        each = known.get(day)
        received, saved = (each.received_bytes, each.bytes_saved) if each else (0, 0)
        text = f"{day}: {format_size(saved)} saved, {format_size(received)} fetched"
        bars.append((day[5:], float(received), float(saved), text))
    return column_chart(bars)


def by_namespace(rows: Sequence[RepositoryRow]) -> list[NamespaceRow]:
    """The largest first.  What replicas of a fleet have differently counts as at the one that has most."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.repository] = max(row.bytes or 0, sizes.get(row.repository, 0))
    found: dict[str, list[int]] = {}
    for repository, size in sizes.items():
        found.setdefault(repository.partition("/")[0], []).append(size)
    namespaces = [NamespaceRow(name, len(each), sum(each)) for name, each in found.items()]
    return sorted(namespaces, key=lambda each: (-each.bytes, each.name))
