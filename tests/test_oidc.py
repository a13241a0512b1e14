"""Tokens of issuers of OpenID Connect: which are believed, why others are not, and whose they are."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Any

import pytest
from joserfc.jwk import ECKey
from joserfc.jws import serialize_compact
from structlog.testing import LogCapture

from proxy.access import oidc as module
from proxy.access.bearer import LEEWAY
from proxy.access.claims import claim, claim_texts
from proxy.access.issuer_documents import USUAL
from proxy.access.issuer_keys import UNKNOWN
from proxy.access.key_sources import key_sources
from proxy.access.oidc import OIDCTokens, TokenRefused, stated_issuer
from proxy.access.rules import Principal
from proxy.config.values import parse_client
from storage.errors import Unavailable
from tests.configuring import access, fault, read
from tests.conftest import Clock
from tests.issuer import Issuer, public, rsa_jwk, signed

OWNER = "required_claims: {repository_owner: acme}"


class Verifier:
    """The tokens of a configuration of one issuer, `ci`, or of several."""

    def __init__(self, issuer: Issuer, clock: Clock) -> None:
        self._issuer, self._clock = issuer, clock
        self._sources: list[Any] = []
        self.tokens = self.of(OWNER)

    def of(self, *members: str, groups: Any = MappingProxyType({})) -> OIDCTokens:
        each = [
            f"ci{number or ''}: {{issuer: '{self._issuer.url}', audience: registry.example, {more}}}"
            for number, more in enumerate(members)
        ]
        issuers = read(access(f"oidc: {{{', '.join(each)}}}")).access.oidc
        sources = key_sources(issuers, self._clock)
        self._sources += sources.values()
        return OIDCTokens(issuers, sources, self._clock, groups)

    async def verify(self, token: str) -> Principal:
        return await self.tokens.verify("", token)

    async def refused(self, token: str, tokens: OIDCTokens | None = None) -> tuple[str, str]:
        """What the response says to the client, and what is logged."""
        with pytest.raises(TokenRefused) as raised:
            await (tokens or self.tokens).verify("", token)
        return str(raised.value), raised.value.detail

    async def close(self) -> None:
        for each in self._sources:
            await each.close()


@pytest.fixture
async def verifier(issuer: Issuer, clock: Clock) -> AsyncIterator[Verifier]:
    verifier = Verifier(issuer, clock)
    yield verifier
    await verifier.close()


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


# Whose they are


async def test_who_it_is(issuer: Issuer, verifier: Verifier) -> None:
    principal = await verifier.verify(issuer.issue())
    assert (principal.user, principal.scheme) == ("ci:repo:acme/app:ref:refs/heads/main", "oidc")
    assert principal.known
    assert not principal.grants
    assert not principal.groups
    assert principal.claims["repository"] == "acme/app"


@pytest.mark.parametrize("algorithm", ["RS256", "PS384"])
async def test_rsa(issuer: Issuer, verifier: Verifier, algorithm: str) -> None:
    issuer.signing["rsa"] = rsa_jwk()
    token = signed(rsa_jwk(), issuer.claims(), {"kid": "rsa"}, algorithm)
    assert (await verifier.verify(token)).known


@pytest.mark.parametrize("header", [{"x5c": ["c" * 1600] * 2}, {"x5t#S256": "t" * 43, "other": "o" * 600}])
async def test_long_headers(issuer: Issuer, verifier: Verifier, header: dict[str, Any]) -> None:
    assert (await verifier.verify(issuer.issue(header=header))).known
    assert (await verifier.verify(issuer.issue(groups=["g" * 90] * 400))).known


async def test_user_and_groups_by_claims(issuer: Issuer, verifier: Verifier) -> None:
    groups = (
        "groups: {deploy: {repository: 'acme/*', ref: [refs/heads/main, 'refs/tags/v*']}, all: {sub: '*'}}"
    )
    tokens = verifier.of(f"{OWNER}, user_claim: repository, groups_claim: /realm/roles, {groups}")
    roles = {"roles": ["dev", "ops", "", 7, None, {}]}
    principal = await tokens.verify("", issuer.issue(ref="refs/tags/v1", realm=roles))
    assert principal.user == "ci:acme/app"
    assert principal.groups == {"deploy", "all", "ci:dev", "ci:ops", "ci:7"}
    principal = await tokens.verify("", issuer.issue(ref="refs/heads/main2", realm="dev"))
    assert principal.groups == {"all"}


async def test_no_issuer_puts_anybody_into_a_group_of_ours(issuer: Issuer, verifier: Verifier) -> None:
    tokens = verifier.of(f"{OWNER}, groups_claim: groups")
    principal = await tokens.verify("", issuer.issue(groups=["ops"], sub="alice"))
    assert not principal.matches(parse_client("group:ops"))
    assert principal.matches(parse_client("group:ci:ops"))
    assert not principal.matches(parse_client("user:alice"))
    assert principal.matches(parse_client("user:ci:alice"))
    assert principal.matches(parse_client("authenticated"))


async def test_groups_of_users(issuer: Issuer, verifier: Verifier) -> None:
    tokens = verifier.of(OWNER, groups={"ci:alice": frozenset({"ops"}), "alice": frozenset({"root"})})
    assert (await tokens.verify("", issuer.issue(sub="alice"))).groups == {"ops"}


@pytest.mark.parametrize("sub", [None, "", [], {}, "a\nb", "x" * 501])
async def test_a_user_without_a_name(issuer: Issuer, verifier: Verifier, sub: Any) -> None:
    assert await verifier.refused(issuer.issue(sub=sub)) == ("its claim sub is missing, or is no name",) * 2


async def test_claims_in_claims(issuer: Issuer, verifier: Verifier) -> None:
    tokens = verifier.of("required_claims: {/kubernetes.io/namespace: [build, 'team-*']}")
    within = {"kubernetes.io": {"namespace": "team-a", "serviceaccount": {"name": "pusher"}}}
    principal = await tokens.verify("", issuer.issue(**within))
    assert principal.matches(parse_client("claim:/kubernetes.io/serviceaccount/name=push*"))
    assert not principal.matches(parse_client("claim:/kubernetes.io/serviceaccount/uid=*"))
    said, _ = await verifier.refused(issuer.issue(**{"kubernetes.io": {"namespace": "kube-system"}}), tokens)
    assert said == "its claim /kubernetes.io/namespace is not what this server requires"
    assert await verifier.refused(issuer.issue(**{"kubernetes.io/namespace": "build"}), tokens)


def test_pointers() -> None:
    claims = {"a/b": {"~c": [1, True, "x", None, 1.5]}, "/": "no pointer leads here", "d": {"": 1}}
    assert claim_texts(claims, "/a~1b/~0c") == ["1", "true", "x"]
    assert claim(claims, "/d/") == 1
    assert claim(claims, "/a~1b/x/y") is None
    assert claim(claims, "a/b") == {"~c": [1, True, "x", None, 1.5]}


# Which are not believed


@pytest.mark.parametrize(
    ("given", "said", "logged"),
    [
        ({"aud": "other"}, "its audience (aud) is not registry.example", "its audience is 'other', not"),
        ({"aud": ["a", "b"]}, "its audience (aud) is not registry.example", "is 'a', 'b', not registry"),
        ({"aud": None}, "one of the claims exp and aud is missing", "missing"),
        ({"exp": None}, "one of the claims exp and aud is missing", "missing"),
        ({"exp": "tomorrow"}, "or a claim has the wrong type", "wrong type"),
        ({"exp": -LEEWAY}, "it has expired", "it expired 60 s ago by the clock of this server"),
        ({"nbf": LEEWAY + 1}, "it is not valid yet", "for another 61 s by the clock of this server"),
        ({"iat": LEEWAY + 1}, "it is not valid yet", "for another 61 s"),
        ({"repository_owner": "evil"}, "its claim repository_owner is not what", "is 'evil', not acme"),
        ({"repository_owner": "Acme"}, "its claim repository_owner is not what", "is 'Acme', not acme"),
        ({"repository_owner": "acme2"}, "its claim repository_owner is not what", "not acme"),
        ({"repository_owner": ["x", "y"]}, "its claim repository_owner is not", "is 'x', 'y', not acme"),
        ({"repository_owner": None}, "its claim repository_owner is not", "is missing, not acme"),
        ({"repository_owner": {"acme": 1}}, "its claim repository_owner is not", "is missing, not acme"),
    ],
)
async def test_claims_that_do_not_do(
    issuer: Issuer, verifier: Verifier, clock: Clock, given: Any, said: str, logged: str, events: LogCapture
) -> None:
    times = {name: clock.now + each for name, each in given.items() if isinstance(each, float)}
    told, detail = await verifier.refused(issuer.issue(**{**given, **times}))
    assert said in told
    assert logged in detail
    assert "evil" not in told  # nor what is required, if the claims do not say so
    assert [
        (each["issuer"], each["reason"]) for each in events.entries if each["event"] == "token.refused"
    ] == [("ci", detail)]


@pytest.mark.parametrize(
    "given",
    [{"exp": 1 - LEEWAY}, {"nbf": LEEWAY}, {"aud": ["x", "registry.example"]}, {"nbf": None, "iat": None}],
)
async def test_clocks_may_differ(issuer: Issuer, verifier: Verifier, clock: Clock, given: Any) -> None:
    times = {name: clock.now + each for name, each in given.items() if isinstance(each, float)}
    assert await verifier.verify(issuer.issue(**{**given, **times}))


async def test_another_key(issuer: Issuer, verifier: Verifier) -> None:
    other = ECKey.generate_key("P-256")
    forged = signed(other, issuer.claims(), {"kid": "first"})
    assert (await verifier.refused(forged))[0] == "its signature is wrong"
    assert (await verifier.refused(signed(other, issuer.claims(), {})))[0] == "its signature is wrong"
    told, logged = await verifier.refused(signed(other, issuer.claims(), {"kid": "x"}))
    assert told == "its issuer has no such key"
    assert logged == "its issuer has no ES256 key 'x'; it has ['first']"
    carried = signed(other, issuer.claims(), {"kid": "first", "jwk": other.as_dict(private=False)})
    assert (await verifier.refused(carried))[0] == "its signature is wrong"


async def test_what_is_not_signed_by_a_private_key(issuer: Issuer, verifier: Verifier) -> None:
    key = json.dumps(public(issuer.signing["first"])).encode()
    payload = encoded(json.dumps(issuer.claims()).encode())
    for algorithm in ("none", "None", "HS256", "HS512", "ES256K", "", "A128KW"):
        start = f"{encoded(json.dumps({'alg': algorithm, 'kid': 'first'}).encode())}.{payload}"
        for signature in ("", encoded(hmac.digest(key, start.encode(), hashlib.sha256))):
            told, logged = await verifier.refused(f"{start}.{signature}")
            assert told == "its algorithm (alg) is not accepted"
            assert repr(algorithm) in logged


async def test_a_key_for_another_algorithm(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    body = json.dumps({"keys": [public(rsa_jwk(), kid="rsa", alg="PS256")]}).encode()
    issuer.answers["/keys"] = 200, {}, body
    assert await verifier.verify(signed(rsa_jwk(), issuer.claims(), {"kid": "rsa"}, "PS256"))
    told, _ = await verifier.refused(signed(rsa_jwk(), issuer.claims(), {"kid": "rsa"}, "RS256"))
    assert told == "its issuer has no such key"


@pytest.mark.parametrize("number", ["1e999", "9" * 5000])
async def test_signed_claims_that_cannot_be_read(issuer: Issuer, verifier: Verifier, number: str) -> None:
    payload = f'{{"iss": "{issuer.url}", "exp": {number}}}'
    key = issuer.signing["first"]
    token = serialize_compact({"alg": "ES256", "kid": "first"}, payload, key, ["ES256"])
    assert (await verifier.refused(token))[0] == "its claims cannot be read"


async def test_tokens_that_are_no_logins(issuer: Issuer, verifier: Verifier) -> None:
    for kind in ("logout+jwt", "secevent+jwt", "application/dpop+jwt"):
        told, _ = await verifier.refused(issuer.issue(header={"typ": kind}))
        assert told == "its type (typ) is not that of a login"
    for good in ("jwt", "at+jwt", "application/at+JWT", None):
        assert await verifier.verify(issuer.issue(header={"typ": good}))


async def test_a_part_that_was_changed(issuer: Issuer, verifier: Verifier) -> None:
    header, payload, signature = issuer.issue().split(".")
    changed = encoded(json.dumps(issuer.claims(repository_owner="acme", sub="root")).encode())
    assert (await verifier.refused(f"{header}.{changed}.{signature}"))[0] == "its signature is wrong"
    assert (await verifier.refused(f"{header}.{payload}.{signature[:-4]}"))[0] == "its signature is wrong"
    critical = signed(issuer.signing["first"], issuer.claims(), {"kid": "first"})
    start = encoded(json.dumps({"alg": "ES256", "kid": "first", "crit": ["exp"]}).encode())
    assert await verifier.refused(f"{start}.{critical.partition('.')[2]}")


@pytest.mark.parametrize(
    "text",
    ["", "a", "a.b.c", "eyJ.eyJ.x", "eyJh.W10.x", "eyJh." + "e30.x", "eyJhbGciOiJub25lIn0", "x" * 99999],
)
def test_what_is_no_token(text: str) -> None:
    assert stated_issuer(text) is None


async def test_an_issuer_that_is_not_configured(issuer: Issuer, verifier: Verifier) -> None:
    for iss in ("https://other.example", f"{issuer.url}/", None, 7):
        token = issuer.issue(iss=iss)
        assert not verifier.tokens.recognizes(token)
        assert "no issuer that is accepted here" in (await verifier.refused(token))[0]
    assert not issuer.asked
    assert verifier.tokens.recognizes(issuer.issue())
    alone = OIDCTokens({}, {}, alone=True)
    assert alone.recognizes(issuer.issue())
    assert not alone.recognizes("a-password")


# Several that call themselves alike


@pytest.mark.parametrize("down", [0, 1])
async def test_one_of_two_with_one_name_cannot_be_asked(
    issuer: Issuer, clock: Clock, verifier: Verifier, down: int
) -> None:
    other = Issuer(clock)
    await other.start()
    await other.stop()
    members = [OWNER, OWNER]
    members[down] += f", jwks_url: '{other.url}/keys'"
    tokens = verifier.of(*members)
    assert (await tokens.verify("", issuer.issue())).known
    with pytest.raises(Unavailable):  # it may be of the one that is down
        await tokens.verify("", signed(other.signing["first"], issuer.claims(), {"kid": "theirs"}))


async def test_two_with_one_name(
    issuer: Issuer, clock: Clock, verifier: Verifier, events: LogCapture
) -> None:
    # Clusters do: each has keys of its own, and is asked where it is.
    other = Issuer(clock)
    other.signing = {"theirs": ECKey.generate_key("P-256")}
    await other.start()
    try:
        tokens = verifier.of("required_claims: {sub: 'a*'}", f"{OWNER}, jwks_url: '{other.url}/keys'")
        theirs = signed(other.signing["theirs"], issuer.claims(sub="abc"), {"kid": "theirs"})
        assert (await tokens.verify("", theirs)).user == "ci1:abc"
        assert (await tokens.verify("", issuer.issue(sub="abc"))).user == "ci:abc"
        await other.stop()
        clock.advance(USUAL * 25)
        assert (await tokens.verify("", issuer.issue(sub="abc"))).user == "ci:abc"
        with pytest.raises(Unavailable):
            await tokens.verify(
                "", signed(other.signing["theirs"], issuer.claims(sub="abc"), {"kid": "theirs"})
            )
        reasons = {each["issuer"] for each in events.entries if each["event"] == "token.refused"}
        assert reasons == {"ci", "ci1"}
    finally:
        await other.stop()


# What is remembered


async def test_a_token_is_verified_once(
    issuer: Issuer, verifier: Verifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = issuer.issue()
    assert not verifier.tokens.remembers("", token)
    principal = await verifier.verify(token)
    assert verifier.tokens.remembers("", token)
    monkeypatch.setattr(module, "deserialize_compact", None)  # would be called for another verification
    assert await verifier.verify(token) is principal
    clock.advance(300 + LEEWAY)
    assert not verifier.tokens.remembers("", token)
    monkeypatch.undo()
    assert (await verifier.refused(token))[0] == "it has expired"


async def test_a_key_that_is_withdrawn_ends_its_tokens(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    token = issuer.issue(exp=clock.now + 10 * USUAL)
    await verifier.verify(token)
    issuer.rotate("second", keep=False)
    clock.advance(UNKNOWN)
    assert verifier.tokens.remembers("", token)  # as the keys are still fresh
    assert await verifier.verify(issuer.issue())
    assert not verifier.tokens.remembers("", token)
    assert (await verifier.refused(token))[0] == "its issuer has no such key"


async def test_so_many_are_remembered(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    tokens = [issuer.issue(sub=f"user-{number}") for number in range(3)]
    for each in tokens:
        await verifier.verify(each)
    assert [verifier.tokens.remembers("", each) for each in tokens] == [False, True, True]


# Tokens that this server issues in exchange


async def test_who_was_verified_before(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    principal = await verifier.verify(issuer.issue())
    assert verifier.tokens.renew(principal) == principal
    elsewhere = verifier.of(f"{OWNER}, groups: {{ops: {{sub: '*'}}}}")  # another worker, or after a reload
    renewed = elsewhere.renew(principal)
    assert renewed is not None
    assert (renewed.user, renewed.groups) == (principal.user, {"ops"})
    assert verifier.of("required_claims: {sub: x}").renew(principal) is None
    await elsewhere.verify("", issuer.issue())
    issuer.rotate("second", keep=False)
    clock.advance(UNKNOWN)
    by_another_key = await verifier.verify(issuer.issue())
    assert verifier.tokens.renew(principal) is None
    # Who has not fetched the keys again does not know of it, nor of the new key.
    assert elsewhere.renew(principal) is not None
    assert elsewhere.renew(by_another_key) is not None
    clock.advance(300 + LEEWAY)
    assert elsewhere.renew(principal) is None
    assert OIDCTokens({}, {}, clock).renew(principal) is None


async def test_an_issuer_that_cannot_be_asked(issuer: Issuer, verifier: Verifier) -> None:
    await issuer.stop()
    with pytest.raises(Unavailable, match="the keys of the issuer ci cannot be fetched now"):
        await verifier.verify(issuer.issue())


# The configuration


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ("issuer: 'https://a.example', audience: x", "access.oidc.a.required_claims: is required"),
        ("required_claims: {}", "required_claims: expected claims and what they must be"),
        ("required_claims: {sub: []}", "required_claims: sub: is empty"),
        ("required_claims: {sub: {a: b}}", "required_claims: sub: expected a glob, or a list"),
        ("required_claims: {sub: 1.5}", "required_claims: sub: expected a glob, or a list"),
        ("required_claims: {/: x}", "required_claims: expected the name of a claim, or a JSON Pointer"),
        ("issuer: a.example", "issuer: expected the URL of an issuer"),
        ("issuer: 'https://a.example?x'", "issuer: expected the URL of an issuer"),
        ("issuer: 'http://a.example'", "keys that are fetched from http://a.example/.well-known/openid-co"),
        ("jwks_url: 'http://a.example/k'", "keys that are fetched from http://a.example/k may be anybody's"),
        ("audience: []", "audience: is empty"),
        ("jwks_file: /k, ca_file: /c", "ca_file does not go with jwks_file"),
        ("keep_keys: 0", "keep_keys: must be more than 0, or never"),
        ("groups: {ops: {}}", "groups.ops: expected claims"),
    ],
)
def test_what_is_wrong(members: str, cause: str) -> None:
    usual = {"issuer": "'https://a.example'", "audience": "x", "required_claims": "{sub: x}"}
    more = (
        ""
        if "is required" in cause
        else "".join(f", {key}: {each}" for key, each in usual.items() if f"{key}:" not in members)
    )
    assert cause in fault(access(f"oidc: {{a: {{{members}{more}}}}}"))


def test_the_name_of_an_issuer() -> None:
    said = fault(access(f"oidc: {{'a:b': {{issuer: 'https://a.example', audience: x, {OWNER}}}}}"))
    assert "the name of an issuer is a word such as github" in said


def test_values_as_yaml_has_them() -> None:
    claims = "required_claims: {repository_owner_id: 123, ref_protected: true}"
    text = f"oidc: {{a: {{issuer: 'http://a.example', audience: [x, y], {claims}, jwks_file: /k}}}}"
    (found,) = read(access(text)).access.oidc.values()
    assert [str(each) for each in found.required_claims] == ["repository_owner_id=123", "ref_protected=true"]
    assert found.audience == ("x", "y")
