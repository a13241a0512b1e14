"""The token endpoint over HTTP: who gets which token, what that is worth, and when it no longer is."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from click.testing import CliRunner

from proxy.access import records
from proxy.cli.main import main
from storage.disk.records import SQLiteRecords
from storage.keys import SIGNING
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.postgres import PostgresServer
from tests.processes import Place, Server, place  # noqa: F401  a fixture
from tests.test_access import ALICE, BLOB, BOB, HUB, LOCAL, STRANGER, Door, Open, login, opened, users  # noqa: F401
from tests.test_hits import hits  # noqa: F401  a fixture
from tests.test_htpasswd import line
from tests.upstream import Upstream

RULES = [
    {"who": ["user:alice"], "may": ["pull", "push", "delete"], "where": ["local/team/*"]},
    {"who": ["user:bob"], "may": ["pull"], "where": ["local/team/*"]},
    {"who": ["anonymous"], "may": ["pull"], "where": ["local/public/*"]},
]
APP = "repository:local/team/app"
SERVICE = "?service=entrepot"
OTHER = "/v2/local/team/other"


class Endpoint(Door):
    """A server with a token endpoint."""

    async def token(
        self, headers: Any = None, *scopes: str, query: str = "", path: str = "/token"
    ) -> dict[str, Any]:
        asked = "".join(f"&scope={each}" for each in scopes)
        said = await self.ask("GET", f"{path}{SERVICE}{asked}{query}", headers)
        assert said.status == 200, said.body
        assert said.headers["Cache-Control"] == "no-store"
        return json.loads(said.body)  # type: ignore[no-any-return]

    async def bearer(self, headers: Any = None, *scopes: str) -> dict[str, str]:
        return bearer((await self.token(headers, *scopes))["token"])

    async def post(self, **form: str) -> tuple[int, dict[str, Any]]:
        data = FormData({"service": "entrepot", "client_id": "test", **form})
        async with self.site.request("POST", "/token", data=data) as response:
            return response.status, await response.json(content_type=None)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


Started = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
def endpoint(opened: Open, users: Path) -> Started:  # noqa: F811
    async def start(settings: Any = None, top: Any = None, **access: Any) -> Endpoint:
        given = {"htpasswd": str(users), "rules": RULES, "token_endpoint": settings or {}, **access}
        door: Door = await opened(given, top=top)
        return Endpoint(door.site)

    return start


# What a token is worth


async def test_a_token_does_what_was_asked_for_and_no_more(endpoint: Started) -> None:
    door = await endpoint()
    wide = await door.bearer(ALICE, f"{APP}:pull,push")
    assert (await door.push(wide)).status == 201
    assert (await door.act("pull", wide)).status == 200
    narrow = await door.bearer(ALICE, f"{APP}:pull")
    assert (await door.act("pull", narrow)).status == 200
    for action, scope in (("push", "pull,push"), ("delete", "delete")):
        said = await door.act(action, narrow)
        assert (said.status, said.code) == (401, "UNAUTHORIZED")
        assert f'scope="{APP}:{scope}",error="insufficient_scope"' in (said.challenge or "")
    said = await door.act("pull", narrow, OTHER)
    assert 'error="insufficient_scope"' in (said.challenge or "")
    assert (await door.act("delete", await door.bearer(ALICE, f"{APP}:*"))).status == 202


async def test_a_token_grants_nothing_that_the_rules_do_not(endpoint: Started) -> None:
    door = await endpoint()
    assert (await door.push(ALICE)).status == 201
    found = await door.token(BOB, f"{APP}:pull,push,delete")
    assert found["scope"] == f"{APP}:pull"
    given = bearer(found["token"])
    assert (await door.act("pull", given)).status == 200
    said = await door.push(given)
    # No other token would help: 401 would make a client ask for one again.
    assert (said.status, said.code) == (403, "DENIED")


async def test_what_everybody_may_needs_no_scope(endpoint: Started) -> None:
    door = await endpoint()
    assert (await door.act("pull", await door.bearer(BOB), "/v2/local/public/app")).status == 404
    assert (await door.act("pull", await door.bearer(), "/v2/local/public/app")).status == 404


async def test_nobody_in_particular_gets_a_token_too(endpoint: Started) -> None:
    door = await endpoint()
    found = await door.token(None, f"{APP}:pull", "repository:local/public/app:pull,push")
    assert found["scope"] == "repository:local/public/app:pull"
    said = await door.act("pull", bearer(found["token"]))
    assert (said.status, 'error="insufficient_scope"' in (said.challenge or "")) == (401, True)


@pytest.mark.parametrize(
    "scopes",
    [
        (f"{APP}:pull,push", "repository:local/team/other:pull"),
        (f"{APP}:pull,push%20repository:local/team/other:pull",),
    ],
)
async def test_a_mount_needs_two_scopes(endpoint: Started, scopes: tuple[str, ...]) -> None:
    door = await endpoint()
    assert (await door.push_blob(ALICE, OTHER)).status == 201
    mount = f"{LOCAL}/blobs/uploads/?mount={Digest.of(BLOB)}&from=local/team/other"
    one = await door.bearer(ALICE, f"{APP}:pull,push")
    said = await door.ask("POST", mount, one)
    assert said.status == 202
    assert (await door.ask("DELETE", said.headers["Location"], one)).status == 204
    assert (await door.ask("POST", mount, await door.bearer(ALICE, *scopes))).status == 201


async def test_the_catalog_needs_its_scope(endpoint: Started) -> None:
    door = await endpoint()
    assert (await door.push_blob(ALICE)).status == 201
    assert (await door.push(ALICE)).status == 201
    said = await door.ask("GET", "/v2/_catalog", await door.bearer(ALICE, f"{APP}:pull"))
    assert 'scope="registry:catalog:*",error="insufficient_scope"' in (said.challenge or "")
    said = await door.ask("GET", "/v2/_catalog", await door.bearer(ALICE, "registry:catalog:*"))
    assert "local/team/app" in json.loads(said.body)["repositories"]
    said = await door.ask("GET", "/v2/_catalog", await door.bearer(None, "registry:catalog:*"))
    assert "local/team/app" not in said.body.decode()


@pytest.mark.clients
async def test_names_are_what_clients_call_them(opened: Open, users: Path) -> None:  # noqa: F811
    given = {"htpasswd": str(users), "rules": RULES, "token_endpoint": {}}
    door = Endpoint((await opened(given, hosts=["registry.example"])).site)
    host = {"Host": "registry.example"}
    said = await door.push({**host, **STRANGER}, "/v2/team/app")
    assert 'scope="repository:team/app:pull,push"' in (said.challenge or "")
    token = await door.token({**ALICE, **host}, "repository:team/app:pull,push")
    assert token["scope"] == f"{APP}:pull,push"
    assert (await door.push({**host, **bearer(token["token"])}, "/v2/team/app")).status == 201
    # Elsewhere the same name is another repository.
    assert (await door.token(ALICE, "repository:team/app:push"))["scope"] == ""


async def test_names_below_a_path_are_those_of_the_path(endpoint: Started) -> None:
    """Harbor and Quay make scopes of the names that they ask for there; others take that of the challenge."""
    door = await endpoint()
    said = await door.ask("GET", "/local/v2/")
    assert f'realm="{door.site.url}/local/token"' in (said.challenge or "")
    refused = await door.ask("GET", "/local/v2/team/app/tags/list")
    assert f'realm="{door.site.url}/local/token"' in (refused.challenge or "")
    for scope in ("repository:team/app:pull", f"{APP}:pull"):
        token = await door.token(ALICE, scope, path="/local/token")
        assert token["scope"] == f"{APP}:pull"
        headers = bearer(token["token"])
        assert (await door.ask("GET", "/local/v2/team/app/tags/list", headers)).status == 404  # none yet
        assert (await door.ask("GET", "/local/v2/team/other/tags/list", headers)).status == 401
    # The namespace of the path is not a reason to grant more than the rules do.
    assert (await door.token(BOB, "repository:team/app:delete", path="/local/token"))["scope"] == ""
    both = await door.token(ALICE, f"{APP}:pull", "registry:catalog:*", path="/local/token")
    assert set(both["scope"].split()) == {f"{APP}:pull", "registry:catalog:*"}


@pytest.mark.parametrize(("agent", "told"), [("harbor-registry-client", True), ("docker/28.0", False)])
async def test_only_harbor_is_told_when_its_token_was_issued(
    endpoint: Started, agent: str, told: bool, clock: Clock
) -> None:
    door = await endpoint()
    token = await door.token({**ALICE, "User-Agent": agent}, f"{APP}:pull")
    issued = datetime.fromtimestamp(int(clock()), UTC).isoformat().replace("+00:00", "Z")
    assert token.get("issued_at") == (issued if told else None)


# How clients are led there


@pytest.mark.parametrize(
    ("headers", "settings", "realm"),
    [
        ({"Host": "one.example:5000"}, {}, "http://one.example:5000/token"),
        ({"Host": "one.example", "X-Forwarded-Proto": "https"}, {}, "https://one.example/token"),
        ({"Host": "one.example"}, {"realm": "https://other.example/auth"}, "https://other.example/auth"),
    ],
)
async def test_a_challenge_names_the_endpoint(
    endpoint: Started, headers: dict[str, str], settings: dict[str, str], realm: str
) -> None:
    door = await endpoint({"service": "mine", **settings})
    said = await door.act("pull", headers)
    assert said.challenge == f'Bearer realm="{realm}",service="mine",scope="{APP}:pull"'
    said = await door.act("pull", {**login("alice", "wrong"), **headers})
    assert (said.challenge or "").startswith(f'Bearer realm="{realm}"')


async def test_passwords_are_accepted_without_a_token(endpoint: Started) -> None:
    door = await endpoint()
    assert (await door.push(ALICE)).status == 201
    assert (await door.ask("GET", "/v2/", ALICE)).status == 200
    assert (await door.ask("GET", "/v2/", await door.bearer(ALICE))).status == 200
    assert (await door.act("pull", login("alice", "wrong"))).status == 401


@pytest.mark.parametrize("headers", [login("alice", "wrong"), login("carol", "x"), bearer("nonsense")])
async def test_a_wrong_login_gets_no_token(endpoint: Started, headers: dict[str, str]) -> None:
    door = await endpoint()
    said = await door.ask("GET", f"/token{SERVICE}&scope={APP}:pull", headers)
    assert (said.status, said.code) == (401, "UNAUTHORIZED")
    assert json.loads(said.body)["error"] == "invalid_grant"


async def test_a_token_is_not_exchanged_for_a_token(endpoint: Started) -> None:
    door = await endpoint()
    given = await door.bearer(ALICE, f"{APP}:pull")
    assert (await door.ask("GET", f"/token{SERVICE}", given)).status == 401
    secret = given["Authorization"].partition(" ")[2]
    for user in ("alice", ""):
        assert (await door.post(grant_type="password", username=user, password=secret))[0] == 401
    # Nor is it a password.
    assert (await door.act("pull", login("alice", secret))).status == 401


async def test_without_an_endpoint_there_is_none(opened: Open, users: Path) -> None:  # noqa: F811
    door = await opened({"htpasswd": str(users)})
    for method in ("GET", "POST"):
        assert (await door.ask(method, "/token", ALICE)).status == 404
    assert (await door.ask("POST", "/token")).status == 404


async def test_without_an_endpoint_everybody_gets_the_token_of_nobody(
    opened: Open,  # noqa: F811
    users: Path,  # noqa: F811
) -> None:
    door = await opened({"htpasswd": str(users), "rules": RULES})
    said = await door.ask("GET", "/token?scope=repository:local/public/app:pull")
    given = bearer(json.loads(said.body)["token"])
    for shown in (given, bearer("QQ==")):
        assert (await door.act("pull", shown, "/v2/local/public/app")).status == 404
        refused = await door.act("pull", shown)
        assert (refused.status, refused.challenge) == (401, 'Basic realm="entrepot"')
    assert (await door.act("pull", bearer("another"), "/v2/local/public/app")).status == 401


# OAuth


async def test_a_form_is_exchanged_too(endpoint: Started) -> None:
    door = await endpoint()
    status, found = await door.post(
        grant_type="password",
        username="alice",
        password="wonderland",
        scope=f"{APP}:pull,push registry:catalog:*",
    )
    assert status == 200
    assert found["access_token"] == found["token"]
    assert (found["token_type"], found["expires_in"]) == ("Bearer", 300)
    assert found["scope"] == f"{APP}:pull,push registry:catalog:*"
    assert "refresh_token" not in found
    assert (await door.push(bearer(found["access_token"]))).status == 201


async def test_a_refresh_token_stands_for_the_password(endpoint: Started) -> None:
    door = await endpoint()
    refresh = (await door.token(ALICE, query="&offline_token=true"))["refresh_token"]
    status, found = await door.post(
        grant_type="refresh_token", refresh_token=refresh, scope=f"{APP}:pull,push"
    )
    assert status == 200
    assert (await door.push(bearer(found["access_token"]))).status == 201
    status, other = await door.post(
        grant_type="password", username="alice", password="wonderland", access_type="offline"
    )
    assert (await door.post(grant_type="refresh_token", refresh_token=other["refresh_token"]))[0] == 200
    # It opens nothing itself, and an access token refreshes nothing.
    assert (await door.act("pull", bearer(refresh))).status == 401
    access = found["access_token"]
    assert (await door.post(grant_type="refresh_token", refresh_token=access))[0] == 401


async def test_there_may_be_no_refresh_tokens(endpoint: Started) -> None:
    door = await endpoint({"refresh": "off"})
    assert "refresh_token" not in await door.token(ALICE, query="&offline_token=true")
    door = await endpoint()
    assert "refresh_token" not in await door.token(None, query="&offline_token=true")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "the form has no grant_type"),
        ({"grant_type": "password", "service": "other"}, "service='other' is not this one"),
        ({"x" * 70000: "x"}, "the form is larger than 65536 bytes"),
        ({f"a{number}": "x" for number in range(300)}, "the form is not UTF-8, or has too many fields"),
    ],
)
async def test_what_is_no_request_for_a_token(endpoint: Started, form: dict[str, str], message: str) -> None:
    door = await endpoint()
    status, found = await door.post(**form)
    assert (status, found["error"]) == (400, "invalid_request")
    assert message in found["errors"][0]["message"]


async def test_a_grant_type_that_there_is_not(endpoint: Started) -> None:
    door = await endpoint()
    status, found = await door.post(grant_type="client_credentials")
    assert (status, found["error"]) == (400, "unsupported_grant_type")
    assert "grant_type='client_credentials' is not supported" in found["errors"][0]["message"]


async def test_a_body_that_is_no_form(endpoint: Started) -> None:
    door = await endpoint()
    said = await door.ask("POST", "/token", {"Content-Type": "application/json"}, b"{}")
    assert said.status == 400
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await door.ask("POST", "/token", form, b"grant_type=\xff")).status == 400
    assert (await door.ask("PUT", "/token", form, b"")).status == 405
    assert (await door.ask("GET", "/token?service=other", ALICE)).status == 400


# When it is worth nothing any more


@pytest.mark.parametrize("password", [None, "another"])
async def test_a_user_who_is_gone_has_no_token(
    endpoint: Started,
    users: Path,  # noqa: F811
    password: str | None,
) -> None:
    door = await endpoint()
    found = await door.token(ALICE, f"{APP}:pull,push", query="&offline_token=true")
    bobs = await door.token(BOB, f"{APP}:pull", query="&offline_token=true")
    given = bearer(found["token"])
    assert (await door.push(given)).status == 201
    for _ in range(3):  # it is remembered
        assert (await door.act("pull", given)).status == 200
    left = users.read_text().splitlines(keepends=True)[1]
    users.write_text(left + ("" if password is None else line("alice", password)))
    said = await door.act("pull", given)
    assert (said.status, 'error="invalid_token"' in (said.challenge or "")) == (401, True)
    assert (await door.post(grant_type="refresh_token", refresh_token=found["refresh_token"]))[0] == 401
    assert (await door.act("pull", bearer(bobs["token"]))).status == 200
    assert (await door.post(grant_type="refresh_token", refresh_token=bobs["refresh_token"]))[0] == 200


async def test_a_token_ends(endpoint: Started, clock: Clock) -> None:
    door = await endpoint({"lifetime": "2m", "refresh": "1h"})
    found = await door.token(ALICE, f"{APP}:pull,push", query="&offline_token=true")
    assert found["expires_in"] == 120
    assert "issued_at" not in found  # clients would compare it with clocks of their own
    clock.advance(119)
    assert (await door.push(bearer(found["token"]))).status == 201
    for _ in range(3):
        assert (await door.act("pull", bearer(found["token"]))).status == 200
    clock.advance(2)
    said = await door.act("pull", bearer(found["token"]))
    assert 'error="invalid_token"' in (said.challenge or "")
    assert (await door.post(grant_type="refresh_token", refresh_token=found["refresh_token"]))[0] == 200
    clock.advance(3600)
    assert (await door.post(grant_type="refresh_token", refresh_token=found["refresh_token"]))[0] == 401


async def test_other_rules_hold_for_tokens_that_are_there(endpoint: Started) -> None:
    door = await endpoint()
    given = await door.bearer(ALICE, f"{APP}:pull,push")
    assert (await door.push(given)).status == 201
    await door.site.app.stop()
    less = await endpoint(rules=[{**RULES[0], "may": ["pull"]}])
    assert (await less.act("pull", given)).status == 200
    assert (await less.push(given)).status == 403
    await less.site.app.stop()
    none = await endpoint(rules=[])
    assert (await none.act("pull", given)).status == 403


async def test_servers_with_the_same_records_know_each_other_s_tokens(endpoint: Started) -> None:
    one, two = await endpoint(), await endpoint()
    given = await one.bearer(ALICE, f"{APP}:pull,push")
    assert (await two.push(given)).status == 201
    assert (await one.act("pull", await two.bearer(BOB, f"{APP}:pull"))).status == 200


async def test_keys_are_rotated(endpoint: Started, clock: Clock) -> None:
    door = await endpoint({"refresh": "50d"})
    refresh = (await door.token(ALICE, query="&offline_token=true"))["refresh_token"]
    assert len(signing(door.site)) == 1
    clock.advance(40 * 86400)
    assert (await door.act("pull", await door.bearer(ALICE, f"{APP}:pull"))).status == 404
    assert len(signing(door.site)) == 2
    assert (await door.post(grant_type="refresh_token", refresh_token=refresh))[0] == 200
    clock.advance(41 * 86400)  # the first key has signed nothing that is still valid
    await door.bearer(ALICE)
    assert len(signing(door.site)) == 2


def signing(site: Site) -> list[str]:
    stored = SQLiteRecords(site.directory / "access" / "records")
    try:
        return list(stored.keys(SIGNING.prefix()))
    finally:
        stored.close()


async def test_a_key_that_is_gone_has_signed_nothing(endpoint: Started) -> None:
    door = await endpoint()
    given = await door.bearer(ALICE, f"{APP}:pull,push")
    assert (await door.push(given)).status == 201
    assert (await door.act("pull", given)).status == 200
    stored = SQLiteRecords(door.site.directory / "access" / "records")
    for key in list(stored.keys(SIGNING.prefix())):
        stored.delete(key)
    stored.close()
    assert (await door.act("pull", given)).status == 401


async def test_an_operator_ends_all_tokens(endpoint: Started) -> None:
    door = await endpoint()
    found = await door.token(ALICE, f"{APP}:pull,push", query="&offline_token=true")
    given = bearer(found["token"])
    assert (await door.push(given)).status == 201
    command = ["keys", "end-tokens", "--server", str(door.site.app.admin_url)]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert (result.exit_code, result.output) == (0, "all tokens are ended: 1 key deleted\n")
    assert (await door.act("pull", given)).status == 401
    assert (await door.post(grant_type="refresh_token", refresh_token=found["refresh_token"]))[0] == 401
    assert (await door.act("pull", ALICE)).status == 200
    assert (await door.act("pull", await door.bearer(ALICE, f"{APP}:pull"))).status == 200


async def test_there_are_no_tokens_to_end(opened: Open) -> None:  # noqa: F811
    door = await opened({"api_keys": True})
    command = ["keys", "end-tokens", "--server", str(door.site.app.admin_url)]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 1
    assert "set access.token_endpoint" in result.output


@pytest.mark.parametrize("change", ["payload", "signature", "header", "none"])
async def test_a_forged_token_is_refused(endpoint: Started, change: str) -> None:
    door = await endpoint()
    token = (await door.token(BOB, f"{APP}:pull"))["token"]
    other = (await door.token(ALICE, f"{APP}:pull,push"))["token"]
    header, payload, signature = token.split(".")
    forged = {
        "payload": f"{header}.{other.split('.')[1]}.{signature}",
        "signature": f"{header}.{payload}.{other.split('.')[2]}",
        "header": f"{header[:-4]}AAAA.{payload}.{signature}",
        "none": f"{header}.{payload}.",
    }[change]
    said = await door.act("pull", bearer(forged))
    assert (said.status, 'error="invalid_token"' in (said.challenge or "")) == (401, True)


# What it costs


async def test_a_hit_with_a_token_is_answered_at_once(
    endpoint: Started,
    users: Path,  # noqa: F811
    hits: Counter[bool],  # noqa: F811
) -> None:
    door = await endpoint()
    given = await door.bearer(ALICE, f"{APP}:pull,push")
    assert (await door.push(given)).status == 201
    hits.clear()
    for _ in range(5):
        assert (await door.act("pull", given)).status == 200
    assert hits[True] > 1
    before = hits[True]
    users.write_text(line("bob", "builder"))
    assert (await door.act("pull", given)).status == 401
    assert hits[True] == before


# What is written down


async def test_tokens_are_counted_and_no_log_has_one(endpoint: Started, events: Any) -> None:
    door = await endpoint()
    tokens = [(await door.token(each, f"{APP}:pull"))["token"] for each in (ALICE, BOB, None)]
    assert (await door.act("pull", bearer(tokens[0]))).status == 404
    metrics = await door.site.metrics()
    assert re.search(r'entrepot_issued_tokens_total\{scheme="password"\} 2.0', metrics)
    assert re.search(r'entrepot_issued_tokens_total\{scheme="anonymous"\} 1.0', metrics)
    served = [each for each in events.entries if each["event"] == "request.served"]
    assert [each["user"] for each in served] == ["alice", "bob", "", "alice"]
    assert not any(each.split(".")[2] in repr(events.entries) for each in tokens)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_who_is_refused_a_token_is_logged(
    endpoint: Started, tmp_path: Path, events: Any, method: str
) -> None:
    audit = {"file": str(tmp_path / "audit.log"), "kinds": ["login", "token"]}
    door = await endpoint(top={"audit": audit})
    if method == "GET":
        await door.ask("GET", "/token", login("alice", "wr0ng"))
        await door.token(ALICE, f"{APP}:pull")
    else:
        await door.post(grant_type="password", username="alice", password="wr0ng")
        await door.post(grant_type="password", username="alice", password="wonderland", scope=f"{APP}:pull")
    (refused,) = [each for each in events.entries if each["event"] == "access.refused"]
    assert (refused["action"], refused["user"], refused["log_level"]) == ("token", "", "info")
    written = (tmp_path / "audit.log").read_text()
    records = [json.loads(each) for each in written.splitlines()]
    assert [(each["kind"], each["result"], each.get("user")) for each in records] == [
        ("login", "refused", None),
        ("token", "done", "alice"),
    ]
    assert records[1]["reference"] == f"{APP}:pull"
    assert "wr0ng" not in written


# Several processes


@pytest.mark.clients
async def test_all_workers_know_tokens_and_keys_also_after_a_restart(
    place: Place,  # noqa: F811
    users: Path,  # noqa: F811
) -> None:
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree["access"] = {
        "htpasswd": str(users),
        "rules": RULES,
        "token_endpoint": {},
        "api_keys": True,
    }
    path = "/v2/local/team/app/tags/list"

    async def statuses(server: Server, headers: Mapping[str, str]) -> list[int]:
        found = []
        for worker in await server.workers():
            async with worker.ask(path, **headers) as response:
                found.append(response.status)
        return found

    async def command(*words: str) -> bytes:
        given = ["-m", "proxy", "keys", *words, "--config", str(place.configure())]
        process = await asyncio.create_subprocess_exec(sys.executable, *given, stdout=subprocess.PIPE)
        printed, _ = await process.communicate()
        assert process.returncode == 0
        return printed

    server = await place.start()
    one, two = await server.workers()
    asked = f"/token{SERVICE}&scope={APP}:pull"
    tokens = [
        bearer(json.loads(await each.get(asked, Authorization=ALICE["Authorization"]))["token"])
        for each in (one, two)
    ]
    key = bearer(json.loads(await command("create", "ci", "--scope", f"{APP}:pull", "--json"))["key"])
    for headers in (*tokens, key):
        assert await statuses(server, headers) == [404, 404]  # there is none, but it is allowed
    await server.stop()
    server = await place.start()
    for headers in (*tokens, key):
        assert await statuses(server, headers) == [404, 404]
    users.write_text("")
    await command("revoke", "ci")
    for headers in (*tokens, key):
        assert await statuses(server, headers) == [401, 401]
    await server.stop()


@pytest.mark.clients
async def test_servers_that_share_a_database_know_each_other_s_tokens_and_keys(
    serve: Serve,
    upstream: Upstream,
    postgres_server: PostgresServer,
    users: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "RECENT", 0.0)  # a second otherwise
    access = {"htpasswd": str(users), "rules": RULES, "token_endpoint": {}, "api_keys": True}
    top = {"access": access, "shared": {"records": postgres_server.database()}}
    more = {"local": {"store": {}}}
    one, two = [
        Endpoint(await serve(upstream, directory=tmp_path / name, more=more, top=top)) for name in ("a", "b")
    ]
    given = await one.bearer(ALICE, f"{APP}:pull,push")
    assert one.site.app.admin_url is not None
    url = one.site.app.admin_url / "api/v1/keys"
    async with one.site.session.post(url, json={"name": "ci", "scopes": [f"{APP}:pull"]}) as response:
        key = bearer((await response.json())["key"])
    exchanged = await two.bearer(key, f"{APP}:pull")
    for headers in (given, await two.bearer(BOB, f"{APP}:pull"), key, exchanged):
        for door in (one, two):
            assert (await door.act("pull", headers)).status == 404
    assert not (tmp_path / "a" / "access").exists()
    async with one.site.session.delete(url, json={"name": "ci"}) as response:
        assert response.status == 200
    for headers in (key, exchanged):
        for door in (two, one):
            assert (await door.act("pull", headers)).status == 401
