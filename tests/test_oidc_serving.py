"""A server that believes an issuer of OpenID Connect: jobs pull and push with their own tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.config.errors import StartError
from tests.conftest import Clock, Serve
from tests.issuer import Issuer, public
from tests.test_access import BASIC, Door, Open, bearer, login, token
from tests.test_bearer import PRIVATE, Server, pem
from tests.test_htpasswd import line
from tests.upstream import Basic, Upstream


@pytest.fixture
def opened(serve: Serve, upstream: Upstream) -> Open:
    """A server with a store, local, and an `access` as in the configuration."""

    async def open(access: dict[str, Any]) -> Door:
        return Door(await serve(upstream, more={"local": {"store": {}}}, top={"access": access}))

    return open


def oidc(issuer: Issuer, rules: Any = None, **more: Any) -> dict[str, Any]:
    required = {"repository_owner": "acme"}
    usual = {"issuer": issuer.url, "audience": "registry.example", "required_claims": required}
    access: dict[str, Any] = {"oidc": {"ci": {**usual, **more}}}
    return access if rules is None else {**access, "rules": rules}


PUSHES = [{"who": ["group:deploy"], "may": ["pull", "push"], "where": ["local/team/*"]}]
DEPLOY = {"groups": {"deploy": {"repository": "acme/app", "ref": "refs/heads/main"}}}
MAIN = {"ref": "refs/heads/main"}


@pytest.mark.parametrize("form", [bearer, lambda text: login("oidc", text), lambda text: login("any", text)])
async def test_a_job_pushes_and_pulls(
    opened: Open,
    issuer: Issuer,
    form: Callable[[str], dict[str, str]],
) -> None:
    door = await opened(oidc(issuer, PUSHES, **DEPLOY))
    said = await door.push({})
    assert (said.status, said.challenge) == (401, BASIC)
    assert (await door.ask("GET", "/v2/", form(issuer.issue(**MAIN)))).status == 200
    assert (await door.push(form(issuer.issue(**MAIN)))).status == 201
    assert (await door.act("pull", form(issuer.issue(**MAIN)))).status == 200
    assert (await door.act("delete", form(issuer.issue(**MAIN)))).status == 403
    assert (await door.push(form(issuer.issue(**MAIN)), "/v2/local/other/app")).status == 403
    said = await door.push(form(issuer.issue(ref="refs/heads/feature")))
    assert (said.status, said.code) == (403, "DENIED")
    assert issuer.asked["/keys"] == 1


async def test_why_a_token_is_refused(opened: Open, issuer: Issuer, events: LogCapture) -> None:
    door = await opened(oidc(issuer, PUSHES, **DEPLOY))
    for given, said in (
        ({"aud": "https://github.com/acme"}, "its audience (aud) is not registry.example"),
        ({"repository_owner": "evil"}, "its claim repository_owner is not what this server requires"),
        ({"iss": "https://other.example"}, "it is of no issuer that is accepted here (access.oidc)"),
    ):
        answer = await door.push(login("oidc", issuer.issue(**given)))
        (error,) = json.loads(answer.body)["errors"]
        assert error["message"].startswith(f"the token is not accepted: {said}")
        assert (answer.status, answer.challenge) == (401, BASIC)
        assert "acme" not in error["message"]
    refused = [each["reason"] for each in events.entries if each["event"] == "token.refused"]
    assert refused == [
        "its audience is 'https://github.com/acme', not registry.example",
        "its claim repository_owner is 'evil', not acme",
    ]
    text = repr(events.entries)
    assert issuer.issue().split(".")[0] not in text
    assert "evil" not in repr([each for each in events.entries if each["event"] == "request.served"])


async def test_an_issuer_that_is_down_is_no_refusal(opened: Open, issuer: Issuer, clock: Clock) -> None:
    door = await opened(oidc(issuer, PUSHES, **DEPLOY))
    await issuer.stop()
    said = await door.push(bearer(issuer.issue(**MAIN)))
    assert (said.status, said.code) == (503, "UNAVAILABLE")
    assert int(said.headers["Retry-After"]) > 0


async def test_many_jobs_cause_one_fetch(opened: Open, issuer: Issuer) -> None:
    door = await opened(oidc(issuer, PUSHES, **DEPLOY))
    issuer.gate = asyncio.Event()
    tokens = [issuer.issue(sub=f"job-{number}") for number in range(30)]
    pings = [asyncio.create_task(door.ask("GET", "/v2/", bearer(each))) for each in tokens]
    await issuer.was_asked(1, "/.well-known/openid-configuration")
    issuer.gate.set()
    assert {each.status for each in await asyncio.gather(*pings)} == {200}
    assert sum(issuer.asked.values()) == 2


async def test_pulls_that_come_again_are_judged_again(opened: Open, issuer: Issuer, clock: Clock) -> None:
    door = await opened(oidc(issuer, PUSHES, **DEPLOY))
    given = bearer(issuer.issue(**MAIN))
    assert (await door.push(given)).status == 201
    assert [(await door.act("pull", given)).status for _ in range(4)] == [200] * 4
    clock.advance(400)
    assert (await door.act("pull", given)).status == 401


async def test_beside_passwords_and_a_token_server(
    opened: Open, issuer: Issuer, tmp_path: Path, clock: Clock
) -> None:
    keys, server = tmp_path / "token.pem", Server(clock)
    keys.write_bytes(pem(PRIVATE["EC"]))
    users = tmp_path / "htpasswd"
    users.write_text(line("alice", "wonderland"))
    access = {**token(keys, htpasswd=str(users)), **oidc(issuer)}
    door = await opened(access)
    assert (await door.push(login("alice", "wonderland"))).status == 201
    assert (await door.act("pull", login("alice", issuer.issue()))).status == 200
    granted = server.issue(access=[{"type": "repository", "name": "local/team/app", "actions": ["pull"]}])
    assert (await door.act("pull", bearer(granted))).status == 200
    assert (await door.act("delete", bearer(granted))).status == 401
    # Without rules, whoever the issuer vouches for is a user.
    assert (await door.act("delete", bearer(issuer.issue()))).status == 202


async def test_rules_name_claims(opened: Open, issuer: Issuer) -> None:
    who = ["claim:/kubernetes.io/namespace=team-*"]
    door = await opened(oidc(issuer, [{"who": who, "may": ["pull", "push"], "where": ["local/team/*"]}]))
    within = {"kubernetes.io": {"namespace": "team-a"}}
    assert (await door.push(bearer(issuer.issue(**within)))).status == 201
    assert (await door.push(bearer(issuer.issue()))).status == 403


async def test_without_a_network(opened: Open, clock: Clock, tmp_path: Path) -> None:
    issuer = Issuer(clock)  # which is never started
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public(issuer.signing["first"], kid="first")]}))
    door = await opened(oidc(issuer, PUSHES, **DEPLOY, jwks_file=str(path)))
    assert (await door.push(bearer(issuer.issue(**MAIN)))).status == 201


async def test_a_cache_with_rules(serve: Serve, upstream: Upstream, issuer: Issuer) -> None:
    upstream.image("library/alpine", "latest")
    rules = [{"who": ["authenticated"], "may": ["pull"], "where": ["docker.io/*"]}]
    door = Door(await serve(upstream, top={"access": oidc(issuer, rules)}, visibility="rules"))
    path = "/v2/library/alpine/manifests/latest"
    assert (await door.ask("GET", path)).status == 401
    assert (await door.ask("GET", path, login("oidc", issuer.issue()))).status == 200


@pytest.mark.parametrize(
    ("key", "content", "cause"),
    [
        ("jwks_file", None, "{} (access.oidc.ci.jwks_file): No such file or directory"),
        ("jwks_file", "{}", "{} (access.oidc.ci.jwks_file): its JWKS has no key for signatures"),
        ("ca_file", None, "{} (access.oidc.ci.ca_file): No such file or directory"),
        ("ca_file", "x", "{} (access.oidc.ci.ca_file): it has no certificate"),
        ("token_file", None, "{} (access.oidc.ci.token_file): No such file or directory"),
    ],
)
async def test_it_does_not_start(
    opened: Open,
    clock: Clock,
    tmp_path: Path,
    key: str,
    content: str | None,
    cause: str,
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    fetched = {"jwks_url": "https://keys.example/"} if key != "jwks_file" else {}
    with pytest.raises(StartError) as raised:
        await opened(oidc(Issuer(clock), **fetched, **{key: str(path)}))
    assert str(raised.value).startswith(cause.format(path))


async def test_exchanged_for_a_token_of_this_server(opened: Open, issuer: Issuer, clock: Clock) -> None:
    access = {**oidc(issuer, PUSHES, **DEPLOY), "token_endpoint": {}}
    door = await opened(access)
    said = await door.push({})
    assert said.challenge is not None and said.challenge.startswith("Bearer ")
    path = "/token?service=entrepot&scope=repository:local/team/app:pull,push"
    said = await door.ask("GET", path, login("oidc", issuer.issue(**MAIN)))
    answer = json.loads(said.body)
    exchanged = bearer(answer["token"])
    assert answer["expires_in"] <= 300 + 60  # no longer than the token of the issuer
    assert (await door.push(exchanged)).status == 201
    assert (await door.act("delete", exchanged)).status in (401, 403)
    assert (await door.ask("GET", path, login("oidc", issuer.issue(aud="other")))).status == 401
    issuer.rotate("second", keep=False)
    clock.advance(10)
    assert (await door.act("pull", exchanged)).status == 200
    assert (await door.act("pull", bearer(issuer.issue(**MAIN)))).status == 200  # the keys are fetched again
    assert (await door.act("pull", exchanged)).status == 401  # as the key is withdrawn that it depends on


async def test_many_groups_are_in_a_token_once(opened: Open, issuer: Issuer) -> None:
    rules = [{"who": ["group:ci:team-7"], "may": ["pull", "push"], "where": ["local/team/*"]}]
    door = await opened({**oidc(issuer, rules, groups_claim="groups"), "token_endpoint": {}})
    theirs = issuer.issue(groups=[f"team-{number}" for number in range(400)])
    path = "/token?service=entrepot&scope=repository:local/team/app:pull,push"
    ours = json.loads((await door.ask("GET", path, login("oidc", theirs))).body)["token"]
    assert len(ours) < len(theirs) + 1000
    assert (await door.push(bearer(ours))).status == 201


async def test_a_token_of_an_upstream_is_a_login_there(
    serve: Serve, upstream: Upstream, issuer: Issuer
) -> None:
    # Some registries give out tokens as passwords.
    theirs = issuer.issue(iss="https://registry.example")
    upstream.image("library/alpine", "latest")
    upstream.auth = Basic("caller", theirs)
    options, access = {"username": "caller", "password": theirs}, oidc(issuer)
    door = Door(await serve(upstream, options=options, top={"access": access}, visibility="caller"))
    path = "/v2/library/alpine/manifests/latest"
    assert (await door.ask("GET", path, login("caller", theirs))).status == 200
    assert (await door.ask("GET", path, login("caller", issuer.issue()))).status == 401
