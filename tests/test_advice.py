"""What a valid configuration does that its operator may not expect."""

from __future__ import annotations

import pytest

from proxy.config.advice import advise
from tests.configuring import TOKEN, read

HUB = "docker.io: {upstream: https://hub.example}"
USERS = "htpasswd: /etc/htpasswd"
PULL = "rules: [{who: [anonymous], may: [pull]}]"


def said(access: str, store: str = "store: {}", more: str = HUB, top: str = "") -> list[str]:
    text = f"access: {{{access}}}\nnamespaces: {{local: {{{store}}}, {more}}}\n{top}"
    return [str(each) for each in advise(read(text))]


@pytest.mark.parametrize("users", [USERS, TOKEN])
def test_docker_that_cannot_log_in(users: str) -> None:
    (line,) = said(users)
    assert line == (
        "namespaces.local: docker cannot log in at 127.0.0.1:5000 to push: give it a listener of its own,"
        " such as listen: 127.0.0.1:5002"
    )
    # The port is one that is free.
    line, _ = said(users, top="listen: ':7000'\nadmin: '127.0.0.1:7001'")
    assert line.endswith("such as listen: :7002")


@pytest.mark.parametrize(
    ("access", "store", "more", "top"),
    [
        (USERS, "store: {}, listen: '127.0.0.1:7000'", HUB, ""),
        (USERS, "store: {}, hosts: [registry.example]", HUB, ""),
        (USERS, "store: {}", HUB, "default_namespace: local"),
        (USERS, "store: {}", "", ""),
        (f"{USERS}, ping: challenge", "store: {}", HUB, ""),
        (f"{USERS}, ping: challenge, {PULL}", "store: {}", HUB, ""),
        (f"{USERS}, {PULL[:-3]}], where: ['edge/*']}}]", "store: {}, hosts: [r.example]", HUB, ""),
        (f"{TOKEN}, {PULL}", "store: {}, hosts: [registry.example]", HUB, ""),
        ("", "store: {}", HUB, ""),
    ],
)
def test_docker_that_can_log_in_or_has_no_reason_to(access: str, store: str, more: str, top: str) -> None:
    assert said(access, store, more, top) == []


@pytest.mark.parametrize("store", ["store: {}", "store: {}, listen: '127.0.0.1:7000'"])
@pytest.mark.parametrize("where", ["", ", where: ['local/*']", ", where: ['*']"])
def test_docker_that_is_not_asked_since_everybody_may_pull(store: str, where: str) -> None:
    rule = PULL.replace("[pull]", f"[pull]{where}")
    (line,) = said(f"{USERS}, {rule}", store)
    assert "since everybody may pull: set access.ping: challenge" in line


def test_docker_that_is_never_asked() -> None:
    (line,) = said(f"{USERS}, ping: open", "store: {}, listen: '127.0.0.1:7000'")
    assert line == "namespaces.local: docker cannot log in to push: set access.ping: auto"


@pytest.mark.parametrize(
    ("access", "top"),
    [
        ("", "listen: ':5000'"),
        (PULL, ""),
        (PULL, "listen: ':5000'"),
        ("realm: mine", ""),
    ],
)
def test_a_store_that_nobody_may_push_to(access: str, top: str) -> None:
    (line,) = said(access, top=top)
    assert line.startswith("namespaces.local: nobody may push: add users (access.htpasswd)")


@pytest.mark.parametrize(
    ("access", "top"),
    [
        ("", "listen: '[::1]:5000'"),
        ("", "listen: localhost:5000"),
        (PULL.replace("[pull]", "[pull, push]"), "listen: ':5000'"),
        ("", "listen: ':5000'\ntls: {certificate: /c.pem, client_ca: /ca.pem}"),
    ],
)
def test_a_store_that_somebody_may_push_to(access: str, top: str) -> None:
    assert said(access, top=top) == []


# What is unwise


@pytest.mark.parametrize(
    ("listen", "access", "start"),
    [
        ("8.8.8.8:5000", "", "listen: speaks plain HTTP at 8.8.8.8:5000: set tls"),
        ("[2a00:1450::1]:5000", "", "listen: speaks plain HTTP at [2a00:1450::1]:5000: set tls"),
        ("8.8.8.8:5000", USERS, "listen: passwords cross the network in plain text at 8.8.8.8:5000: set tls"),
        (":5000", USERS, "listen: passwords cross the network in plain text at :5000: set tls"),
        ("0.0.0.0:5000", USERS, "listen: passwords cross the network in plain text at 0.0.0.0:5000"),
        (":5000", "", None),
        ("10.0.0.7:5000", USERS, None),
        ("cache.example:5000", USERS, None),
        ("127.0.0.1:5000", USERS, None),
        (":5000", f"{USERS}, trusted_proxies: [10.0.0.0/8]", None),
    ],
)
def test_plain_http(listen: str, access: str, start: str | None) -> None:
    text = f"listen: '{listen}'\nadmin: off\naccess: {{{access}}}\nnamespaces: {{{HUB}}}"
    found = [str(each) for each in advise(read(text))]
    assert [line.startswith(start or "") for line in found] == ([True] if start else [])
    assert advise(read(f"{text}\ntls: {{certificate: /c.pem}}")) == []


def test_an_admin_listener_that_answers_nobody() -> None:
    (line,) = map(str, advise(read("admin: '0.0.0.0:7001'")))
    assert line.startswith("admin: without a token 0.0.0.0:7001 refuses all other machines: set admin_token")
    assert advise(read("admin: '0.0.0.0:7001'\nadmin_token: t")) == []
    assert advise(read("admin: off")) == []


@pytest.mark.parametrize(
    ("patterns", "place", "cause"),
    [
        (["library/*"], 0, "no tag has a / in it"),
        (["alpine:3*"], 0, "no tag has a : in it"),
        (["1.*", "sha256@*"], 1, "no tag has a @ in it"),
        (["re:v1/.*"], 0, "no tag has a / in it"),
        (["1.*", "1.*"], 1, "tags[0] comes first"),
        (["latest", "*", "v*"], 2, "tags[1] comes first"),
        (["re:.*", "v*"], 1, "tags[0] comes first"),
    ],
)
def test_a_rule_that_never_applies(patterns: list[str], place: int, cause: str) -> None:
    tags = ", ".join(f"{{match: '{each}', fresh_for: 1h}}" for each in patterns)
    (line,) = map(str, advise(read(f"namespaces: {{x: {{upstream: https://x.example, tags: [{tags}]}}}}")))
    assert line.startswith(f"namespaces.x.tags[{place}].match: never ")
    assert cause in line


@pytest.mark.parametrize(
    "patterns",
    [["1.*", "*"], ["v[0-9]*", "re:a|b/c"], ["re:a/?b"], ["re:(?:a/)?b"], ["[!/]*"], ["re:v\\d+", "re:v.*"]],
)
def test_a_rule_that_applies(patterns: list[str]) -> None:
    tags = ", ".join(f"{{match: '{each}', fresh_for: 1h}}" for each in patterns)
    assert advise(read(f"namespaces: {{x: {{upstream: https://x.example, tags: [{tags}]}}}}")) == []


def test_rules_of_stores_and_repositories() -> None:
    text = """\
namespaces:
  x:
    upstream: https://x.example
    repositories: [{match: team/*, keep_for: 1d}, {match: '*', keep_for: 2d}, {match: a, keep_for: 3d}]
  y: {store: {keep_tags: [{match: 'team/*', last: 3}]}}
"""
    repositories, kept = map(str, advise(read(text)))
    assert repositories.startswith("namespaces.x.repositories[2].match: never applies, since repositories[1]")
    assert kept.startswith("namespaces.y.store.keep_tags[0].match: never matches")


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        (
            "{tags: [v*, 'app:1'], last: 1}",
            ["keep_tags[0].tags[1]: never matches, since no tag has a : in it"],
        ),
        ("{match: 'a/b', pulled_within: 1d}", ["keep_tags[0].match: never matches"]),
        (
            "{repositories: ['y/team/*'], last: 1}",
            ["keep_tags[0].repositories[0]: matches only repositories of y/y"],
        ),
        ("{last: 1}, {tags: [v*], last: 2}", ["keep_tags[1]: never applies, since keep_tags[0] comes first"]),
        ("{tags: [a, v*], last: 1}, {match: v*, last: 2}", ["keep_tags[1]: never applies"]),
        ("{last: 1}, {tags: [v*], last: 2, pulled_within: 1d}", []),
        ("{pushed_within: 1d}, {tags: [v*], last: 2}", []),
        ("{repositories: [a], last: 1}, {tags: [v*], last: 2}", []),
        ("{tags: [v*], last: 1}, {last: 2}, {tags: [x*], pushed_within: 3d}", []),
        ("{repositories: ['team/*', 'yy/*'], last: 1}, {repositories: [b], last: 1}", []),
    ],
)
def test_rules_for_tags_of_stores(rules: str, lines: list[str]) -> None:
    found = [*map(str, advise(read(f"namespaces: {{y: {{store: {{keep_tags: [{rules}]}}}}}}")))]
    assert len(found) == len(lines)
    for text, line in zip(found, lines, strict=True):
        assert text.startswith(f"namespaces.y.store.{line}")


FLEET = "peers: {{{}, secret: a-secret-of-the-tests}}"


@pytest.mark.parametrize(
    ("peers", "listen", "told"),
    [
        ("dns: 'peers:5000'", "", True),
        ("urls: ['http://127.0.0.1:5000', 'http://cache-2:5000']", "", True),
        ("urls: ['http://127.0.0.1:5000', 'http://[::1]:5001']", "", False),
        ("dns: 'peers:5000'", "listen: ':5000'", False),
    ],
)
def test_a_replica_that_no_other_reaches(peers: str, listen: str, told: bool) -> None:
    lines = [str(each) for each in advise(read(f"{listen}\n{FLEET.format(peers)}"))]
    assert [each.startswith("listen: other replicas (peers) cannot reach") for each in lines] == [True] * told


GITHUB = "https://token.actions.githubusercontent.com"


@pytest.mark.parametrize(
    ("issuer", "claims", "advised"),
    [
        (GITHUB, "{repository_owner: acme}", False),
        (GITHUB, "{repository_owner_id: 123, ref: refs/heads/main}", False),
        (GITHUB, "{sub: 'repo:acme/*'}", False),
        (GITHUB, "{sub: 'repo:*:ref:refs/heads/main'}", True),
        (GITHUB, "{sub: ['repo:acme/*', 'repo:*']}", True),
        (GITHUB, "{repository: '*/app'}", True),
        (GITHUB, "{ref: refs/heads/main}", True),
        # Whoever may call a workflow of ours gets a token that names it.
        (GITHUB, "{job_workflow_ref: 'acme/*'}", True),
        ("https://gitlab.com", "{project_path: 'acme/*'}", False),
        ("https://gitlab.com/", "{ref_protected: true}", True),
        ("https://gitlab.example", "{sub: '*'}", False),
    ],
)
def test_issuers_that_serve_everybody(issuer: str, claims: str, advised: bool) -> None:
    keys = f"issuer: '{issuer}', audience: registry.example, required_claims: {claims}"
    lines = said(f"oidc: {{ci: {{{keys}}}}}", "store: {}, listen: '127.0.0.1:7000'")
    assert bool(lines) is advised
    for line in lines:
        assert line.startswith("access.oidc.ci.required_claims: anybody can get a token of https://")


@pytest.mark.parametrize(("users", "advised"), [("", True), (f", {USERS}", False), (f", {TOKEN}", False)])
def test_a_token_endpoint_where_nobody_can_log_in(users: str, advised: bool) -> None:
    lines = said(f"token_endpoint: {{}}{users}", "store: {}, listen: '127.0.0.1:7000'")
    assert any(each.startswith("access.token_endpoint: nobody can log in there") for each in lines) is advised


@pytest.mark.parametrize(
    ("shared", "store", "told"),
    [
        ("", "", True),
        ("records: 'postgresql://db/a'", "", True),  # of a private registry, and there is none
        ("records: 'postgresql://db/a'", "local: {store: {}}", False),
        ("records: 'postgresql://db/a', caches: {}, bucket: 's3://a'", "", False),
    ],
)
def test_replicas_that_do_not_know_each_other_s_tokens(shared: str, store: str, told: bool) -> None:
    text = f"""
listen: ':5000'
access: {{api_keys: true, token_endpoint: {{}}, rules: []}}
{FLEET.format("dns: 'peers:5000'")}
shared: {{{shared}}}
namespaces: {{{HUB}, {store}}}
"""
    lines = [str(each) for each in advise(read(text))]
    found = [each.partition(":")[0] for each in lines if "the other replicas (peers) accept none" in each]
    assert found == (["access.token_endpoint", "access.api_keys"] if told else [])
