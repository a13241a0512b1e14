"""The web page as an application, which the admin listener serves below /ui/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from aiohttp import web

from proxy.admin.api.app import State
from proxy.admin.operations import Operations
from proxy.config.schema import Config
from proxy.ui.jobs import Jobs
from proxy.ui.protection import Protection, set_headers
from proxy.ui.rendering import PREFIX, STATIC, Renderer, static
from proxy.ui.screens.access import AccessScreen
from proxy.ui.screens.acts import ActsScreen
from proxy.ui.screens.audit import AuditScreen
from proxy.ui.screens.history import HistoryScreen
from proxy.ui.screens.image import ImageScreen
from proxy.ui.screens.overview import OverviewScreen
from proxy.ui.screens.policy import PolicyScreen
from proxy.ui.screens.repositories import RepositoriesScreen
from proxy.ui.screens.storage import StorageScreen
from proxy.ui.screens.transfers import TransfersScreen
from proxy.ui.screens.why import WhyScreen
from proxy.ui.sessions import Sessions
from proxy.ui.snapshot import RepositorySnapshot

KEPT = "public, max-age=31536000, immutable"  # their addresses change with them


class Screen(Protocol):
    """A part of the page."""

    def routes(self) -> Iterable[web.RouteDef]:
        """Routes below the prefix, each of one element."""


def pages(
    config: Config, operations: Operations, state: State, clock: Callable[[], float]
) -> web.Application | None:
    """The application of the page, with all screens; None if there is none.  `state` is that of /readyz."""
    if config.admin_ui == "off":
        return None
    token = config.admin_token
    renderer = Renderer(clock, acts=config.admin_ui == "on", login=token is not None)
    protection = Protection(config, Sessions(token, clock), renderer)
    jobs = Jobs(clock)
    repositories = RepositorySnapshot(operations)
    screens: list[Screen] = [
        protection,
        OverviewScreen(operations, state, repositories, renderer, clock),
        RepositoriesScreen(operations, repositories, renderer),
        ImageScreen(operations, renderer),
        TransfersScreen(operations, jobs, renderer),
        HistoryScreen(operations, renderer),
        StorageScreen(operations, repositories, renderer),
        PolicyScreen(operations, renderer),
        AccessScreen(config.access, operations, renderer),
        AuditScreen(operations, renderer),
        WhyScreen(operations, renderer),
        ActsScreen(operations, jobs, renderer, config.admin_ui == "read_only", repositories.forget),
    ]
    application = web.Application(middlewares=protection.middlewares())
    application.on_cleanup.append(lambda _: repositories.close())
    application.on_response_prepare.append(set_headers)
    application.on_cleanup.append(lambda app: jobs.close())
    for each in screens:
        application.add_routes(each.routes())
    for name in STATIC:
        application.router.add_get("/" + name, _file)
    return application


async def _file(request: web.Request) -> web.Response:
    name = request.path.removeprefix(PREFIX)
    headers = {"Cache-Control": KEPT}
    return web.Response(body=static(name), content_type=STATIC[name], charset="utf-8", headers=headers)
