"""API keys: what they are, what they may do, and when that ends."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from proxy.access import api_keys as module
from proxy.access import records as access_records
from proxy.access.api_keys import START, ApiKeys, KeyExists, _principal, key_scope
from proxy.access.credentials import BadCredential
from proxy.access.records import AGAIN, RECENT, STALE, AccessRecords, ApiKey
from proxy.access.rules import AccessRules
from proxy.admin.pullers import pullers
from proxy.cli.main import main
from proxy.config.access import ACTIONS
from storage.disk.records import SQLiteRecords
from storage.errors import NameUnknown, StorageFailed, StorageUnavailable
from storage.keys import API_KEY, KEY_USED
from tests.configuring import read
from tests.conftest import Clock, Serve
from tests.test_access import ALICE, BLOB, LOCAL, Door, Open, login, opened, users  # noqa: F401
from tests.test_admin import conforms
from tests.test_hits import hits  # noqa: F401  a fixture
from tests.test_policed import served
from tests.test_token_endpoint import bearer
from tests.upstream import Upstream

TEAM = "repository:local/team/*:pull,push"


@pytest.fixture
def made(tmp_path: Path, clock: Clock) -> Any:
    records = SQLiteRecords(tmp_path / "records", durable=True)
    keys = ApiKeys(AccessRecords(records), clock)
    yield keys, records
    records.close()


# Keys alone


async def test_a_key_is_random_and_its_hash_alone_is_kept(made: Any) -> None:
    keys, records = made
    _, one = await keys.create("one", (TEAM,))
    _, two = await keys.create("two", (TEAM,))
    assert one != two
    assert one.startswith(START)
    assert len(one) == len(START) + 43
    stored = b"".join(value for _, value in records.scan(""))
    assert one[len(START) :].encode() not in stored
    assert keys.recognizes(one)
    assert not keys.recognizes("wonderland")


async def test_a_key_says_who_it_is(made: Any, clock: Clock) -> None:
    keys, _ = made
    key, secret = await keys.create("ci", (TEAM, "registry:catalog:*"), clock.now + 60)
    for user in ("", "ci", "anybody"):
        principal = await keys.verify(user, secret)
        assert (principal.user, principal.scheme, principal.known) == ("key:ci", "key", False)
        assert principal.until == clock.now + 60
        assert principal.proof == key.digest
        assert keys.renew(principal) == principal


async def test_a_key_ends(made: Any, clock: Clock) -> None:
    keys, _ = made
    _, secret = await keys.create("ci", (TEAM,), clock.now + 60)
    principal = await keys.verify("", secret)
    assert keys.remembers("", secret)
    clock.advance(61)
    assert not keys.remembers("", secret)
    assert keys.renew(principal) is None
    with pytest.raises(BadCredential, match="it has expired"):
        await keys.verify("", secret)
    assert [each.name for each, _ in await keys.list()] == ["ci"]


async def test_a_revoked_key_is_refused_in_every_process(made: Any, tmp_path: Path, clock: Clock) -> None:
    keys, _ = made
    records = SQLiteRecords(tmp_path / "records")
    other = ApiKeys(AccessRecords(records), clock)
    _, secret = await keys.create("ci", (TEAM,))
    principal = await other.verify("", secret)
    assert other.remembers("", secret)
    await keys.revoke("ci")
    assert not other.remembers("", secret)
    assert other.renew(principal) is None
    with pytest.raises(BadCredential, match="there is none like it"):
        await other.verify("", secret)
    with pytest.raises(NameUnknown, match="there is no API key 'ci'"):
        await keys.revoke("ci")
    # A key of the same name is another one.
    await keys.create("ci", (TEAM,))
    assert other.renew(principal) is None
    records.close()


async def test_a_name_is_given_once(made: Any) -> None:
    keys, _ = made
    await keys.create("ci", (TEAM,))
    with pytest.raises(KeyExists):
        await keys.create("ci", (TEAM,))
    for name in ("", "-a", "a b", "a/b", "a" * 64, "ä"):
        with pytest.raises(ValueError, match="expected up to 63 letters"):
            await keys.create(name, (TEAM,))


async def test_the_last_use_is_known_to_the_minute(made: Any, clock: Clock) -> None:
    keys, records = made
    _, secret = await keys.create("ci", (TEAM,))
    assert [used for _, used in await keys.list()] == [None]
    await keys.verify("", secret)
    first = clock.now
    clock.advance(59)
    assert keys.remembers("", secret)
    await keys.verify("", secret)
    assert [used for _, used in await keys.list()] == [first]
    clock.advance(1)
    assert not keys.remembers("", secret)  # so that its use is recorded
    await keys.verify("", secret)
    assert [used for _, used in await keys.list()] == [first + 60]
    await keys.revoke("ci")
    assert not records.holds(KEY_USED.key("ci"))


async def test_uses_of_many_keys_are_recorded_together(made: Any, tmp_path: Path, clock: Clock) -> None:
    # Each record has all processes read all keys again.
    keys, records = made
    secrets = [(await keys.create(f"k{number}", (TEAM,)))[1] for number in range(20)]
    changes = 0
    transaction = records.transaction

    def count(work: Any) -> Any:
        nonlocal changes
        changes += 1
        return transaction(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "transaction", count)
        for secret in secrets:
            await keys.verify("", secret)
            assert keys.remembers("", secret)
        assert changes == 1
        assert {used for _, used in await keys.list()} == {clock.now}
        await keys.revoke("k3")
        changes = 0
        await keys.close()
        assert changes == 1
    assert not records.holds(KEY_USED.key("k3"))
    again = SQLiteRecords(tmp_path / "records")
    assert [used for _, used in await ApiKeys(AccessRecords(again)).list()] == [clock.now] * 19
    again.close()


async def test_uses_that_wait_are_recorded_after_the_pause(
    made: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, records = made
    monkeypatch.setattr(module, "PAUSE", 0.0)
    secrets = [(await keys.create(name, (TEAM,)))[1] for name in ("one", "two")]
    recorded = asyncio.Event()
    loop, change = asyncio.get_running_loop(), records.transaction

    def tell(work: Any) -> Any:
        change(work)
        if records.holds(KEY_USED.key("two")):
            loop.call_soon_threadsafe(recorded.set)

    monkeypatch.setattr(records, "transaction", tell)
    await asyncio.gather(*(keys.verify("", secret) for secret in secrets))
    await asyncio.wait_for(recorded.wait(), 20)
    await keys.close()


@pytest.mark.errors("access.damaged")
async def test_a_damaged_record_is_no_key(made: Any) -> None:
    keys, records = made
    _, secret = await keys.create("ci", (TEAM,))
    _, other = await keys.create("other", (TEAM,))
    records.put(API_KEY.key("ci"), b"{")
    with pytest.raises(BadCredential):
        await keys.verify("", secret)
    assert (await keys.verify("", other)).user == "key:other"


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class Distant:
    """Records in a database, of a server that may be away, or silent."""

    records: SQLiteRecords
    away: bool = False
    reads: int = 0
    refused: int = 0
    remote: bool = True
    answers: threading.Event = field(default_factory=_set)

    def scan(self, prefix: str) -> Any:
        self.answers.wait()
        if self.away:
            self.refused += 1
            raise StorageFailed("away")
        self.reads += 1
        return self.records.scan(prefix)

    def transaction(self, work: Any) -> Any:
        self.answers.wait()
        if self.away:
            self.refused += 1
            raise StorageFailed("away")
        return self.records.transaction(work)


async def test_records_of_other_servers_are_read_each_second(made: Any, clock: Clock) -> None:
    keys, records = made
    distant, seconds = Distant(records), Clock()
    other = ApiKeys(AccessRecords(distant, seconds), clock)  # type: ignore[arg-type]
    _, secret = await keys.create("ci", (TEAM,))
    assert not other.remembers("", secret)
    principal = await other.verify("", secret)
    await other.verify("", secret)
    before = distant.reads
    for _ in range(5):
        await other.verify("", secret)
        assert other.remembers("", secret)
    assert distant.reads == before
    await keys.revoke("ci")
    seconds.advance(RECENT)
    assert not other.remembers("", secret)
    with pytest.raises(BadCredential):
        await other.verify("", secret)
    assert other.renew(principal) is None


async def test_an_outage_of_the_database_logs_nobody_out_at_once(made: Any, clock: Clock) -> None:
    keys, records = made
    distant, seconds = Distant(records), Clock()
    other = ApiKeys(AccessRecords(distant, seconds), clock)  # type: ignore[arg-type]
    _, secret = await keys.create("ci", (TEAM,))
    await other.verify("", secret)
    distant.away = True
    seconds.advance(STALE - 1)
    for _ in range(3):
        assert (await other.verify("", secret)).user == "key:ci"
        assert other.remembers("", secret)
    assert distant.refused == 1  # not with each request
    seconds.advance(AGAIN)
    with pytest.raises(StorageFailed):
        await other.verify("", secret)
    distant.away = False
    assert (await other.verify("", secret)).user == "key:ci"


async def test_tokens_outlive_api_keys_in_an_outage(made: Any, clock: Clock) -> None:
    keys, records = made
    distant, seconds = Distant(records), Clock()
    access = AccessRecords(distant, seconds, keep=2 * STALE)  # type: ignore[arg-type]
    other = ApiKeys(access, clock)
    _, secret = await keys.create("ci", (TEAM,))
    principal = await other.verify("", secret)
    signing = await access.signing_key(0.0, 10.0, 20.0)
    await access.read()
    distant.away = True
    assert await access.signing_key(15.0, 10.0, 20.0) == signing  # it is due, but there is no other
    with pytest.raises(StorageFailed):
        await access.signing_key(21.0, 10.0, 20.0)
    for at in (STALE, 2 * STALE - 1):
        seconds.now = Clock().now + at
        assert signing.id in (await access.read(keys=False)).signing
        with pytest.raises(StorageFailed):
            await other.verify("", secret)
        assert not other.remembers("", secret)
        assert other.renew(principal) is None  # nor does a token that was issued for it
    seconds.advance(1)
    with pytest.raises(StorageFailed):
        await access.read(keys=False)
    assert access.current() is None


async def test_a_silent_database_is_waited_for_once(
    made: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, records = made
    distant, seconds = Distant(records), Clock()
    other = ApiKeys(AccessRecords(distant, seconds), clock)  # type: ignore[arg-type]
    _, secret = await keys.create("ci", (TEAM,))
    await other.verify("", secret)
    monkeypatch.setattr(access_records, "PATIENCE", 0.0)
    distant.answers.clear()
    seconds.advance(AGAIN)
    clock.advance(module.NOTED)
    for _ in range(3):
        assert (await other.verify("", secret)).user == "key:ci"  # its use is noted later
    seconds.advance(STALE)
    with pytest.raises(StorageUnavailable, match="does not answer"):
        await other.verify("", secret)
    distant.answers.set()
    await other.close()
    await other._records.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("team/app", "expected type:name:actions"),
        ("repository:local/a:pull,sign", "expected the actions pull, push, delete or *"),
        ("registry:catalog:pull", "expected repository:"),
        ("registry:other:*", "expected repository:"),
        ("artifact:a:pull", "expected repository:"),
        ("repository:re:(:pull", "is not a valid regular expression"),
    ],
)
def test_what_is_no_scope_of_a_key(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("(", r"\(")):
        key_scope(text)


patterns = st.sampled_from(["local/*", "local/team/*", "local/team/app", "re:local/.*/app", "*"])
names = st.sampled_from(["local/team/app", "local/team/other", "local/x/app", "other/app", "local/team"])


@pytest.mark.clients
@given(patterns, st.sets(st.sampled_from(ACTIONS), min_size=1), names)
def test_a_key_may_what_its_scope_says(pattern: str, actions: set[Any], name: str) -> None:
    scope = key_scope(f"repository:{pattern}:{','.join(sorted(actions))}")
    written = f"repository:{scope.name}:{','.join(sorted(scope.actions))}"
    found = _principal(ApiKey("ci", "0", (written,), 0.0))
    rules = AccessRules([], ["local", "other"])
    within = (
        re.fullmatch(pattern[3:], name) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
    )
    for action in ACTIONS:
        assert rules.allow(found, action, name) is bool(within and action in actions)
        if rules.allow(found, action, name):
            assert any(name.startswith(each) for each in rules.starts(found, action))


# On a server


class Keyed(Door):
    """A server that accepts API keys, and the commands of its operator."""

    async def run(self, *words: str, code: int = 0) -> str:
        given = ["keys", *words, "--server", str(self.site.app.admin_url), "--wide"]
        result = await asyncio.to_thread(CliRunner().invoke, main, given)
        assert result.exit_code == code, result.output
        return result.output

    async def key(self, name: str, *words: str) -> str:
        found = json.loads(await self.run("create", name, *words, "--json"))
        assert found["row"]["name"] == name
        return str(found["key"])


Started = Callable[..., Awaitable[Keyed]]


@pytest.fixture
def keyed(opened: Open, users: Path) -> Started:  # noqa: F811
    async def start(**access: Any) -> Keyed:
        door: Door = await opened({"api_keys": True, "rules": [], **access})
        return Keyed(door.site)

    return start


@pytest.mark.parametrize("endpoint", [None, {}])
async def test_a_key_is_a_password_and_a_token(keyed: Started, endpoint: Any) -> None:
    door = await keyed(token_endpoint=endpoint)
    secret = await door.key("ci", "--scope", TEAM)
    for headers in (login("ci", secret), login("anybody", secret), bearer(secret)):
        assert (await door.push(headers)).status == 201
        assert (await door.act("pull", headers)).status == 200
        said = await door.act("delete", headers)
        assert (said.status, said.code) == (403, "DENIED")
        assert (await door.act("pull", headers, "/v2/local/other/app")).status == 403
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    for headers in (login("ci", wrong), bearer(wrong), {}):
        said = await door.act("pull", headers)
        assert said.status == 401
        assert (said.challenge or "").startswith("Basic" if endpoint is None else "Bearer")


async def test_a_key_is_exchanged_for_tokens(keyed: Started) -> None:
    door = await keyed(token_endpoint={})
    secret = await door.key("ci", "--scope", TEAM)
    asked = "/token?offline_token=true&scope=repository:local/team/app:pull,delete"
    found = json.loads((await door.ask("GET", asked, login("ci", secret))).body)
    assert found["scope"] == "repository:local/team/app:pull"
    token = bearer(found["token"])
    assert (await door.push(bearer(secret))).status == 201
    assert (await door.act("pull", token)).status == 200
    assert (await door.push(token)).status == 401
    form = {"grant_type": "refresh_token", "refresh_token": found["refresh_token"]}
    async with door.site.request("POST", "/token", data=form) as response:
        assert response.status == 200
    await door.run("revoke", "ci")
    for headers in (token, login("ci", secret), bearer(secret)):
        assert (await door.act("pull", headers)).status == 401
    async with door.site.request("POST", "/token", data=form) as response:
        assert response.status == 401


async def test_a_token_of_a_key_ends_with_it(keyed: Started, clock: Clock) -> None:
    door = await keyed(token_endpoint={})
    secret = await door.key("ci", "--scope", TEAM, "--expires", "2m")
    found = json.loads((await door.ask("GET", "/token", login("ci", secret))).body)
    assert found["expires_in"] == 120


async def test_a_revoked_key_has_no_hits(
    keyed: Started,
    hits: Counter[bool],  # noqa: F811
) -> None:
    door = await keyed()
    given = bearer(await door.key("ci", "--scope", TEAM))
    assert (await door.push(given)).status == 201
    hits.clear()
    for _ in range(5):
        assert (await door.act("pull", given)).status == 200
    assert hits[True] > 1
    await door.run("revoke", "ci")
    assert (await door.act("pull", given)).status == 401


async def test_keys_are_listed_without_themselves(keyed: Started) -> None:
    door = await keyed()
    assert "there are no API keys" in await door.run("list")
    secret = await door.key("ci", "--scope", TEAM, "--scope", "registry:catalog:*", "--expires", "never")
    told = await door.run("list")
    assert "registry:catalog:*" in told
    assert secret not in told
    assert (await door.push(bearer(secret))).status == 201
    row = json.loads(await door.run("list", "--json"))[0]
    assert (row["expires"], row["used"], row["locked"]) == (None, door.site.clock.now, None)
    told = await door.run("create", "other", "--scope", TEAM)
    assert "not shown again" in told
    assert START in told
    assert "is revoked" in await door.run("revoke", "other")
    assert "there is no API key" in await door.run("revoke", "other", code=1)


@pytest.mark.parametrize(
    ("scope", "written"),
    [
        ("repository:local/a:pull", "repository:local/a:pull"),
        ("repository:team/*:push,pull", "repository:local/team/*:pull,push"),
        ("repository:app:*", "repository:local/app:*"),
        ("repository:*/app:pull", "repository:*/app:pull"),
        ("repository:re:local/.*:pull", "repository:re:local/.*:pull"),
        ("repository(x):local/a:pull", "repository:local/a:pull"),
    ],
)
async def test_a_scope_has_full_names(opened: Open, scope: str, written: str) -> None:  # noqa: F811
    door = Keyed((await opened({"api_keys": True, "rules": []}, hosts=["registry.example"])).site)
    await door.key("ci", "--scope", scope)
    (row,) = json.loads(await door.run("list", "--json"))
    assert row["scopes"] == [written]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give at least one"),
        (("--scope", "team/app"), "--scope: team/app: expected type:name:actions"),
        (("--scope", "repository:team/*:pull"), "begin the name with its namespace: local/…"),
        (("--scope", "repository:app:pull"), "begin the name with its namespace: local/…"),
        (("--scope", TEAM, "--expires", "soon"), "expected a duration"),
        (("--scope", TEAM, "--locked", "absent.lock"), "absent.lock cannot be read"),
    ],
)
async def test_what_makes_no_key(keyed: Started, words: tuple[str, ...], message: str) -> None:
    door = await keyed()
    assert message in await door.run("create", "ci", *words, code=2)
    await door.key("taken", "--scope", TEAM)
    assert "there is a key taken" in await door.run("create", "taken", "--scope", TEAM, code=2)


async def test_keys_need_to_be_switched_on(opened: Open, users: Path) -> None:  # noqa: F811
    door = Keyed((await opened({"htpasswd": str(users)})).site)
    for words in (("list",), ("create", "ci", "--scope", TEAM), ("revoke", "ci")):
        assert "set access.api_keys: true" in await door.run(*words, code=1)
    assert (await door.push(bearer(START + "x" * 43))).status == 401


async def test_the_admin_api_answers_as_it_says(keyed: Started) -> None:
    door = await keyed()
    assert door.site.app.admin_url is not None
    url = door.site.app.admin_url / "api/v1/keys"
    body = {"name": "ci", "scopes": [TEAM], "seconds": 60.0}
    for method, sent in (("POST", body), ("GET", None), ("DELETE", {"name": "ci"})):
        async with door.site.session.request(method, url, json=sent) as response:
            assert response.status == 200
            conforms(method, "/api/v1/keys", response.status, await response.json())


async def test_keys_are_made_without_a_server(keyed: Started) -> None:
    door = await keyed()
    await door.site.app.stop()
    config = door.site.directory.parent / "entrepot.yml"

    def run(*words: str) -> Any:
        result = CliRunner().invoke(main, ["keys", *words, "--config", str(config), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    secret = (await asyncio.to_thread(run, "create", "ci", "--scope", TEAM))["key"]
    assert [each["name"] for each in await asyncio.to_thread(run, "list")] == ["ci"]
    again = await keyed()
    assert (await again.push(bearer(secret))).status == 201
    # And beside a server: it knows at once.
    await asyncio.to_thread(run, "revoke", "ci")
    assert (await again.act("pull", bearer(secret))).status == 401


async def test_no_key_is_sent_to_an_upstream(opened: Open, upstream: Upstream) -> None:  # noqa: F811
    door = Keyed((await opened({"api_keys": True, "rules": []}, visibility="caller")).site)
    upstream.image("library/alpine", "latest")
    secret = await door.key("ci", "--scope", TEAM)
    assert (await door.ask("GET", "/v2/library/alpine/manifests/latest", login("ci", secret))).status == 200
    assert upstream.requests
    assert not any("Authorization" in each.headers for each in upstream.requests)


async def test_no_log_has_a_key(keyed: Started, events: Any) -> None:
    door = await keyed(token_endpoint={})
    secret = await door.key("ci", "--scope", TEAM)
    await door.push(bearer(secret))
    await door.act("pull", login("ci", secret + "x"))
    await door.run("revoke", "ci")
    assert [each["name"] for each in events.entries if each["event"].startswith("key.")] == ["ci", "ci"]
    assert {each["user"] for each in events.entries if each["event"] == "request.served"} == {"key:ci", ""}
    assert secret[len(START) :] not in repr(events.entries)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("docker.io/library/alpine:3", None),
        ("local/team/app:1", "user:alice, group:ops from 10.0.0.0/8; API keys all, ci"),
        ("local/public/app:1", "everybody; user:alice, group:ops from 10.0.0.0/8; API key all"),
    ],
)
async def test_why_says_who_may_pull(keyed: Started, reference: str, expected: str | None) -> None:
    rules = [
        {"who": ["anonymous"], "may": ["pull"], "where": ["local/public/*"]},
        {"who": ["user:alice", "group:ops"], "may": ["pull", "push"], "from": ["10.0.0.0/8"]},
        {"who": ["user:bob"], "may": ["push"]},
    ]
    door = await keyed(rules=rules)
    await door.key("ci", "--scope", TEAM)
    await door.key("all", "--scope", "repository:local/*:pull")
    await door.key("pusher", "--scope", "repository:local/*:push")
    assert door.site.app.admin_url is not None
    async with door.site.session.get(
        door.site.app.admin_url / "api/v1/why", params={"ref": reference}
    ) as said:
        assert (await said.json())["access"] == expected
    given = ["why", reference, "--server", str(door.site.app.admin_url), "--wide"]
    told = (await asyncio.to_thread(CliRunner().invoke, main, given)).output
    assert ("may be pulled by" in told) is (expected is not None)


@pytest.mark.parametrize(
    ("access", "local", "expected"),
    [
        ("{}", "store: {}", "clients on this machine; users"),
        ("{rules: []}", "store: {}", "nobody"),
        ("{rules: [{who: [authenticated], may: [pull], where: ['local/x/*']}]}", "store: {}", "nobody"),
        ("{rules: [{who: ['claim:a=b'], may: [pull]}]}", "store: {}", "claim:a"),
        ("{}", "upstream: 'https://x.example', visibility: caller", "whom the upstream lets, by"),
        ("{}", "upstream: 'https://x.example'", None),
    ],
)
def test_who_may_pull_by_the_configuration(access: str, local: str, expected: str | None) -> None:
    found = pullers(read(f"access: {access}\nnamespaces: {{local: {{{local}}}}}"), "local/team/app", [])
    assert found is None if expected is None else (found or "").startswith(expected)


# Lock files


async def test_a_locked_key_pulls_exactly_what_its_file_has(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    children = [upstream.image("a/b", None, [each]) for each in (b"amd64", b"arm64")]
    index = upstream.index("a/b", "v1", children)
    other = upstream.image("a/b", "v2", [b"other"])
    lock = tmp_path / "images.lock"
    lock.write_text(f"# pinned\ndocker.io/a/b:v1@{index.digest}\n")
    rules = [{"who": ["anonymous"], "may": ["pull"], "where": ["*/free/*"]}]
    site = await serve(upstream, top={"access": {"api_keys": True, "rules": rules}}, visibility="rules")
    door = Keyed(site)
    locked = bearer(await door.key("edge", "--locked", str(lock)))
    free = bearer(await door.key("ci", "--scope", "repository:docker.io/*:pull"))

    async def pull(kind: str, reference: Any, headers: Any, method: str = "GET", name: str = "a/b") -> Any:
        return await door.ask(method, f"/v2/{name}/{kind}/{reference}", headers)

    blobs = [each for image in children for kind, each in served(image) if kind == "blobs"]
    for headers in (free, locked):
        for method in ("GET", "HEAD"):
            for reference in ("v1", index.digest, *(each.digest for each in children)):
                assert (await pull("manifests", reference, headers, method)).status == 200
            for each in blobs:
                assert (await pull("blobs", each, headers, method)).status == 200
    for reference in ("v2", other.digest):
        assert (await pull("manifests", reference, free)).status == 200
        said = await pull("manifests", reference, locked)
        assert (said.status, said.code) == (403, "DENIED")
        message = json.loads(said.body)["errors"][0]["message"]
        assert f"is {other.digest}, which is not in the lock file of key:edge" in message
        assert f"of docker.io/a/b it has docker.io/a/b:v1@{index.digest}" in message
    for each in [each for kind, each in served(other) if kind == "blobs"]:
        assert (await pull("blobs", each, free)).status == 200
        assert (await pull("blobs", each, locked)).status == 403
    assert (await pull("manifests", "v1", locked, name="a/c")).status == 403  # its scope
    for _ in range(4):  # also from what is remembered
        assert (await pull("manifests", index.digest, locked)).status == 200
        assert (await pull("manifests", other.digest, locked)).status == 403
        assert (await pull("manifests", other.digest, free)).status == 200


async def test_what_everybody_may_is_locked_too(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    good, bad = upstream.image("a/b", "v1", [b"good"]), upstream.image("a/b", "v2", [b"bad"])
    lock = tmp_path / "images.lock"
    lock.write_text(f"docker.io/a/b:v1@{good.digest}\n")
    site = await serve(upstream, top={"access": {"api_keys": True, "token_endpoint": {}}})
    door = Keyed(site)
    told = await door.run("create", "edge", "--locked", str(lock))
    assert "everybody may pull all of docker.io, with the key or without" in told
    secret = await door.key("other", "--locked", str(lock))
    token = json.loads((await door.ask("GET", "/token", login("x", secret))).body)["token"]
    for headers in (bearer(secret), login("x", secret), bearer(token)):
        assert (await door.ask("GET", f"/v2/a/b/manifests/{good.digest}", headers)).status == 200
        assert (await door.ask("GET", f"/v2/a/b/manifests/{bad.digest}", headers)).status == 403
    assert (await door.ask("GET", f"/v2/a/b/manifests/{bad.digest}")).status == 200


async def test_a_locked_key_only_pulls(keyed: Started, tmp_path: Path) -> None:
    door = await keyed()
    lock = tmp_path / "images.lock"
    lock.write_text(f"local/team/app:1@sha256:{'0' * 64}\n")
    words = ("create", "edge", "--locked", str(lock), "--scope")
    assert "may pull, and nothing else" in await door.run(*words, TEAM, code=2)
    secret = await door.key("edge", "--locked", str(lock))
    assert (await door.push(bearer(secret))).status == 403
    (row,) = json.loads(await door.run("list", "--json"))
    assert (row["scopes"], row["locked"]) == (["repository:local/team/app:pull"], 1)
    lock.write_text("local/team/app:1\n")
    assert "images.lock:1: expected" in await door.run(*words[:-1], code=2)
    lock.write_text("# nothing yet\n")
    assert "it has no image" in await door.run(*words[:-1], code=2)


@pytest.mark.parametrize("who", ["anonymous", "authenticated"])
async def test_a_locked_key_does_not_push_where_everybody_may(
    keyed: Started, tmp_path: Path, who: str
) -> None:
    rules = [{"who": [who], "may": ["pull", "push", "delete"], "where": ["local/team/*"]}]
    door = await keyed(rules=rules, token_endpoint={})
    lock = tmp_path / "images.lock"
    lock.write_text(f"local/team/app:1@sha256:{'0' * 64}\n")
    secret = await door.key("edge", "--locked", str(lock))
    asked = "/token?scope=repository:local/team/app:pull,push,delete"
    found = json.loads((await door.ask("GET", asked, login("ci", secret))).body)
    assert found["scope"] == "repository:local/team/app:pull"
    if who == "anonymous":
        assert (await door.push({})).status == 201
    for headers in (bearer(secret), login("ci", secret), bearer(found["token"])):
        for action in ("push", "delete"):
            said = await door.act(action, headers)
            assert (said.status, said.code) == (403, "DENIED")
            assert f"key:edge is not allowed to {action} local/team/app" in said.body.decode()


async def test_the_audit_log_has_no_key_and_the_beginning_of_a_lock(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    lock, log = tmp_path / "images.lock", tmp_path / "audit.log"
    lock.write_text("".join(f"local/app:{number}@sha256:{number:064x}\n" for number in range(30)))
    top = {"access": {"api_keys": True}, "audit": {"file": str(log), "kinds": ["admin"]}}
    door = Keyed(await serve(upstream, more={"local": {"store": {}}}, top=top))
    secret = await door.key("edge", "--locked", str(lock))
    (record,) = map(json.loads, log.read_text().splitlines())
    assert record["operation"] == "create_key"
    assert record["arguments"]["name"] == "edge"
    assert record["arguments"]["lock"][-1] == "and 10 more"
    assert len(record["arguments"]["lock"]) == 21
    assert secret not in log.read_text()
    (row,) = json.loads(await door.run("list", "--json"))
    assert row["locked"] == 30


async def test_an_override_opens_no_lock(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    good = upstream.image("a/b", "v1", [b"good"])
    upstream.image("a/b", "v2", [b"bad"])
    lock = tmp_path / "images.lock"
    lock.write_text(f"docker.io/a/b:v1@{good.digest}\n")
    policy = {"rules": [{"name": "no", "action": "deny", "tags": ["v2"], "reason": "x"}]}
    site = await serve(upstream, top={"access": {"api_keys": True}, "policy": policy})
    door = Keyed(site)
    secret = await door.key("edge", "--locked", str(lock))
    words = ["policy", "override", "a/b:v2", "--for", "1h", "--reason", "x"]
    given = [*words, "--server", str(site.app.admin_url)]
    assert (await asyncio.to_thread(CliRunner().invoke, main, given)).exit_code == 0
    assert (await door.ask("GET", "/v2/a/b/manifests/v2")).status == 200
    assert (await door.ask("GET", "/v2/a/b/manifests/v2", bearer(secret))).status == 403
    assert (await door.ask("GET", "/v2/a/b/manifests/v1", bearer(secret))).status == 200
