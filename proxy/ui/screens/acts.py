"""Acts: a form for each, a page on which it is confirmed, and what came of it.

All of this works without JavaScript.  A form asks for the page that confirms it; that one changes something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from proxy.admin.api.audited import ARGUMENTS, OPERATION
from proxy.admin.key_reports import KeyCreated
from proxy.admin.operations import Operations
from proxy.admin.reports import Deleted, Purged
from proxy.namespaces.references import FieldInvalid
from proxy.ui.acts import ACTS, Act, done
from proxy.ui.answers import Answer, tried
from proxy.ui.facts import facts
from proxy.ui.jobs import Jobs
from proxy.ui.rendering import Renderer
from storage.errors import Unavailable

WAITED = 3.0  # seconds for the result of an act, after which it goes on by itself


class ActsScreen:
    """The acts of the page.  With `read_only` there are none.  `changed` is called after each."""

    def __init__(
        self,
        operations: Operations,
        jobs: Jobs,
        renderer: Renderer,
        read_only: bool,
        changed: Callable[[], None],
        waited: float = WAITED,
    ) -> None:
        self._operations = operations
        self._jobs = jobs
        self._renderer = renderer
        self._read_only = read_only
        self._changed = changed
        self._waited = waited

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/acts", self._list), web.get("/confirm", self._confirm), web.post("/act", self._do)]

    async def _list(self, request: web.Request) -> web.Response:
        self._refuse()
        drill = (await tried(self._operations.drill())).found
        return self._renderer.page(request, "acts.html", "Actions", table=ACTS.values(), drill=drill)

    async def _confirm(self, request: web.Request) -> web.Response:
        self._refuse()
        act, form = _read(request.query)
        arguments, preview = act.arguments(form, whole=act.preview), None
        if act.preview:
            preview = await tried(done(self._operations, act, arguments, dry_run=True))
            preview = _something(preview)
        return self._renderer.page(
            request,
            "confirm.html",
            act.title,
            status=preview.status if preview else 200,
            act=act,
            form=form,
            fault=preview.fault if preview else "",
            would=facts(preview.found) if preview else [],
        )

    async def _do(self, request: web.Request) -> web.Response:
        act, form = _read({name: value for name, value in (await request.post()).items() if name != "csrf"})
        arguments = act.arguments(form)
        request[OPERATION], request[ARGUMENTS] = act.operation, arguments
        if self._jobs.full:
            raise Unavailable("too much is under way: try again when some of it has ended", retry_after=30.0)
        subject = str(next(iter(arguments.values()), ""))
        job = self._jobs.begin(act.title, subject, self._work(request, act, arguments))
        await asyncio.wait({job.task}, timeout=None if act.secret else self._waited)
        if job.running:
            raise web.HTTPSeeOther(location="transfers")
        found = job.task.result()
        made = found if isinstance(found, KeyCreated) else None
        return self._renderer.page(
            request,
            "done.html",
            act.title,
            act=act,
            form=form,
            found=facts(made.row if made else found),
            failed=getattr(found, "error", None),
            made=made,
        )

    async def _work(self, request: web.Request, act: Act, arguments: Mapping[str, Any]) -> Any:
        try:
            return await done(self._operations, act, arguments)
        finally:
            request.config_dict["cache"].forget()  # the summaries of the admin API; also after a failure
            self._changed()

    def _refuse(self) -> None:
        if self._read_only:
            raise web.HTTPForbidden(reason="the page is read-only: admin_ui is read_only")


def _something(preview: Answer[Any]) -> Answer[Any]:
    """The preview, or a fault if there is nothing to do."""
    found = preview.found
    absences = found.absences if isinstance(found, Purged) else 0
    if isinstance(found, Purged | Deleted) and not (found.references or found.kept or absences):
        return Answer(None, "nothing that is stored matches", 404)
    return preview


def _read(given: Mapping[str, Any]) -> tuple[Act, dict[str, str]]:
    """The act that is asked for, and the fields of its form.  Raises FieldInvalid."""
    form = {name: value for name, value in given.items() if name != "act"}
    if (act := ACTS.get(str(given.get("act", "")))) is None:
        raise FieldInvalid("act", "there is no such act")
    if strange := [name for name, value in form.items() if not isinstance(value, str)]:
        raise FieldInvalid(strange[0], "is a file")
    return act, form
