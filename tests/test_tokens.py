"""Tokens: challenges, realms, and what a realm is asked, as the realm sees it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import string
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from yarl import URL

from proxy.upstream import tokens as tokens_module
from proxy.upstream.challenges import Challenge, parse_challenges
from proxy.upstream.credentials import Credential, Credentials, Inline
from proxy.upstream.tokens import TokenCache, TokenResponse, realm_allowed
from storage.errors import OriginDenied, OriginFailed, OriginTimeout, TooManyRequests
from tests.conftest import Clock

HUB = "registry-1.docker.io"
SCOPE = "repository:library/alpine:pull"
REALM = "https://auth.docker.io/token"
BEARER = f'Bearer realm="{REALM}",service="registry.docker.io",scope="{SCOPE}"'
BASIC = 'Basic realm="a registry"'


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


# Challenges


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([""], []),
        (["Basic"], [Challenge("basic")]),
        (['Bearer realm="r",scope="a:b:pull,push c:d:*"'],
         [Challenge("bearer", {"realm": "r", "scope": "a:b:pull,push c:d:*"})]),
        (['BEARER Realm="r" , SERVICE = s'], [Challenge("bearer", {"realm": "r", "service": "s"})]),
        (['Bearer realm="a \\"b\\\\ c, Basic realm=x"'],
         [Challenge("bearer", {"realm": 'a "b\\ c, Basic realm=x'})]),
        (['Bearer realm=""'], [Challenge("bearer", {"realm": ""})]),
        (['Bearer realm="r", Basic realm="b", charset="UTF-8"'],
         [Challenge("bearer", {"realm": "r"}), Challenge("basic", {"realm": "b", "charset": "UTF-8"})]),
        (['Basic realm="b"', 'Bearer realm="r"'],
         [Challenge("basic", {"realm": "b"}), Challenge("bearer", {"realm": "r"})]),
        (["Negotiate, NTLM TlRMTV==, Basic realm=b"],
         [Challenge("negotiate"), Challenge("ntlm", {}, "TlRMTV=="), Challenge("basic", {"realm": "b"})]),
        ([", ,Basic realm=b,,"], [Challenge("basic", {"realm": "b"})]),
        # From servers that err
        (["Bearer realm=https://h/token?a=b,service=s"],
         [Challenge("bearer", {"realm": "https://h/token?a=b", "service": "s"})]),
        (['Bearer realm="r" service="s"'], [Challenge("bearer", {"realm": "r", "service": "s"})]),
        (['Bearer realm="r",realm="other"'], [Challenge("bearer", {"realm": "r"})]),
        (['realm="lost", Basic realm="b"'], [Challenge("basic", {"realm": "b"})]),
        (['@, Basic realm="b"'], [Challenge("basic", {"realm": "b"})]),
        (['Bearer realm="r'], [Challenge("bearer")]),
    ],
)  # fmt: skip
def test_challenges(values: list[str], expected: list[Challenge]) -> None:
    assert parse_challenges(values) == expected


@pytest.mark.clients
@given(st.lists(st.text() | st.text(alphabet='aB=", \\\t@-', max_size=60)))
def test_no_input_raises(values: list[str]) -> None:
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower() != ""


LETTERS = string.ascii_letters + string.digits
TOKEN = st.text(LETTERS + "!#$%&'*+-.^_`|~", min_size=1, max_size=20)
TOKEN68 = st.builds("{}{}".format, st.text(LETTERS + "-._~+/", min_size=1), st.text("=", max_size=3))
CHALLENGE = st.builds(
    Challenge, TOKEN.map(str.lower), st.dictionaries(TOKEN.map(str.lower), st.text(max_size=20), max_size=4)
) | st.builds(Challenge, TOKEN.map(str.lower), st.just({}), TOKEN68)


def build(challenge: Challenge) -> str:
    quoted = {name: re.sub(r'(["\\])', r"\\\1", value) for name, value in challenge.parameters.items()}
    rest = ", ".join(f'{name}="{value}"' for name, value in quoted.items())
    return f"{challenge.scheme.title()} {challenge.token68 or rest}".rstrip(" ")


@pytest.mark.clients
@given(st.lists(CHALLENGE, max_size=5))
def test_challenges_come_back_as_built(challenges: list[Challenge]) -> None:
    assert parse_challenges([build(each) for each in challenges]) == challenges
    assert parse_challenges([", ".join(build(each) for each in challenges)]) == challenges


# Realms


@pytest.mark.parametrize(
    ("host", "realm", "allowed"),
    [
        (HUB, "https://auth.docker.io/token", True),
        (HUB, "https://AUTH.Docker.IO./token", True),
        (HUB, "https://docker.io:8443/token", True),
        (HUB, "https://evil.example/token", False),
        (HUB, "https://auth.docker.io.evil.example/token", False),
        (HUB, "https://evildocker.io/token", False),
        (HUB, "https://auth.docker.io@evil.example/token", False),
        (HUB, "https://user@auth.docker.io/token", False),
        (HUB, "http://auth.docker.io/token", False),
        (HUB, "ftp://auth.docker.io/token", False),
        (HUB, "/token", False),
        (HUB, "", False),
        ("registry.gitlab.co.uk", "https://gitlab.co.uk/jwt/auth", True),
        ("registry.one.co.uk", "https://two.co.uk/jwt/auth", False),
        ("foo.github.io", "https://foo.github.io/token", True),
        ("foo.github.io", "https://bar.github.io/token", False),
        ("foo.github.io", "https://auth.foo.github.io/token", True),
        ("github.io", "https://foo.github.io/token", False),
        ("localhost:5000", "https://localhost:5001/token", True),
        ("localhost:5000", "https://otherhost/token", False),
        ("registry", "https://auth/token", False),
        ("10.0.0.1:5000", "https://10.0.0.1/token", True),
        ("10.0.0.1:5000", "https://9.0.0.1/token", False),
        ("[::1]:5000", "https://[::1]:5001/token", True),
        ("[::1]:5000", "https://[::2]:5000/token", False),
        ("registry.bücher.example", "https://auth.xn--bcher-kva.example/token", True),
    ],
)
def test_realms(host: str, realm: str, allowed: bool) -> None:
    assert realm_allowed(URL(realm), host) is allowed


@pytest.mark.parametrize(
    ("listed", "realm", "allowed"),
    [
        ("login.example", "https://login.example/token", True),
        ("login.example", "https://login.example:8443/token", True),
        ("login.example:8443", "https://login.example:8443/token", True),
        ("login.example:8443", "https://login.example/token", False),
        ("login.example", "https://a.login.example/token", False),
        ("login.example", "http://login.example/token", False),
    ],
)
def test_listed_realms(listed: str, realm: str, allowed: bool) -> None:
    assert realm_allowed(URL(realm), HUB, [listed]) is allowed


def test_realms_by_plain_http() -> None:
    assert realm_allowed(URL("http://localhost:5001/token"), "localhost:5000", plain_http=True)
    assert not realm_allowed(URL("http://evil.example/token"), "localhost:5000", plain_http=True)


# A realm in memory


class Realm:
    """Answers what is in `answers`, in order, then tokens t1, t2, …; keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, URL, str | None, Mapping[str, str] | None]] = []
        self.answers: list[TokenResponse | Exception] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.issued = 0

    async def __call__(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> TokenResponse:
        self.requests.append((method, url, headers.get("Authorization"), form))
        self.asked.set()
        await self.gate.wait()
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.issued += 1
        return issue(token=f"t{self.issued}", expires_in=300)


class Rotating(Credentials):
    """Password p0 until forgotten, then p1 and so on up to `last`."""

    def __init__(self, last: int = 1) -> None:
        self.last, self.count = last, 0

    async def get(self, host: str, repository: str = "") -> Credential | None:
        return Credential("ci", f"p{min(self.count, self.last)}")

    def forget(self) -> None:
        self.count += 1


def issue(**members: object) -> TokenResponse:
    return TokenResponse(200, json.dumps(members).encode())


@pytest.fixture
async def realm() -> Realm:
    return Realm()


@pytest.fixture
async def tokens(realm: Realm, clock: Clock) -> TokenCache:
    return TokenCache(HUB, Credentials(), realm, clock=clock)


# Asking


async def test_nothing_is_asked_before_a_challenge(tokens: TokenCache, realm: Realm) -> None:
    assert await tokens.authorization(SCOPE) is None
    assert realm.requests == []


async def test_an_anonymous_token(tokens: TokenCache, realm: Realm) -> None:
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"
    assert await tokens.authorization(SCOPE) == "Bearer t1"
    url = URL(REALM).with_query({"service": "registry.docker.io", "scope": SCOPE})
    assert realm.requests == [("GET", url, None, None)]


async def test_a_token_with_credentials(realm: Realm) -> None:
    tokens = TokenCache(HUB, Inline("ci", "secret"), realm)
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"
    url = URL(REALM).with_query({"service": "registry.docker.io", "scope": SCOPE, "account": "ci"})
    assert realm.requests == [("GET", url, basic("ci", "secret"), None)]


async def test_a_token_for_an_identity_token(realm: Realm) -> None:
    class Identity(Credentials):
        async def get(self, host: str, repository: str = "") -> Credential | None:
            return Credential("", identity_token="refresh")

    tokens = TokenCache(HUB, Identity(), realm)
    realm.answers = [issue(access_token="a1", refresh_token="other", expires_in=300)]
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer a1"
    form = {
        "grant_type": "refresh_token",
        "refresh_token": "refresh",
        "client_id": "entrepot",
        "service": "registry.docker.io",
        "scope": SCOPE,
    }
    assert realm.requests == [("POST", URL(REALM), None, form)]


async def test_a_realm_with_a_query_keeps_it(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [f'Bearer realm="{REALM}?tenant=a%26b"'], None)
    assert list(realm.requests[0][1].query.items()) == [("tenant", "a&b"), ("scope", SCOPE)]


@pytest.mark.parametrize(
    ("theirs", "ours", "asked"),
    [
        ("", SCOPE, [SCOPE]),
        (SCOPE, SCOPE, [SCOPE]),
        ("repository:library/alpine:pull,push", SCOPE, ["repository:library/alpine:pull,push"]),
        ("repository:library/alpine:*", SCOPE, ["repository:library/alpine:*"]),
        ("repository:mirror/alpine:pull", SCOPE, ["repository:mirror/alpine:pull", SCOPE]),
        ("repository:library/alpine:pull", "repository:library/alpine:pull,push",
         ["repository:library/alpine:pull,push"]),
        ("", "repository:a:push repository:b:pull", ["repository:a:push", "repository:b:pull"]),
        ("", "", []),
    ],
)  # fmt: skip
async def test_scopes(tokens: TokenCache, realm: Realm, theirs: str, ours: str, asked: list[str]) -> None:
    challenge = f'Bearer realm="{REALM}"' + (f',scope="{theirs}"' if theirs else "")
    await tokens.renew(ours, [challenge], None)
    assert realm.requests[0][1].query.getall("scope", []) == asked
    assert await tokens.authorization(ours) == "Bearer t1"


async def test_tokens_are_kept_per_scope_and_the_realm_for_all(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    assert await tokens.authorization("repository:library/busybox:pull") == "Bearer t2"
    assert await tokens.authorization("repository:library/busybox:pull") == "Bearer t2"
    assert await tokens.authorization(SCOPE) == "Bearer t1"
    url = URL(REALM).with_query({"service": "registry.docker.io", "scope": "repository:library/busybox:pull"})
    assert [request[1] for request in realm.requests[1:]] == [url]


# Lifetimes


@pytest.mark.parametrize(
    ("members", "held"),
    [
        ({"token": "t"}, 54),
        ({"token": "t", "expires_in": None}, 54),
        ({"token": "t", "expires_in": 0}, 54),
        ({"access_token": "t", "expires_in": 300, "issued_at": "1999-01-01T00:00:00Z"}, 270),
        ({"token": "t", "access_token": "other", "expires_in": "300"}, 270),
        ({"token": "t", "expires_in": 20}, 15),
        ({"token": "t", "expires_in": 4}, 2),
    ],
)
async def test_lifetimes(
    tokens: TokenCache, realm: Realm, clock: Clock, members: dict[str, object], held: float
) -> None:
    realm.answers = [issue(**members)]
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t"
    clock.advance(held - 0.5)
    assert await tokens.authorization(SCOPE) == "Bearer t"
    clock.advance(0.5)
    assert await tokens.authorization(SCOPE) == "Bearer t1"


async def test_the_lifetime_counts_from_the_request(tokens: TokenCache, realm: Realm, clock: Clock) -> None:
    realm.gate.clear()
    renewal = asyncio.create_task(tokens.renew(SCOPE, [BEARER], None))
    await realm.asked.wait()
    clock.advance(270)  # a slow answer
    realm.gate.set()
    assert await renewal == "Bearer t1"
    assert await tokens.authorization(SCOPE) == "Bearer t2"


async def test_the_oldest_tokens_go(
    tokens: TokenCache, realm: Realm, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "TOKENS_KEPT", 2)
    await tokens.renew("a", [BEARER], None)
    clock.advance(200)
    await tokens.authorization("b")
    clock.advance(100)
    assert await tokens.authorization("a") == "Bearer t3"  # the first one has lapsed
    assert await tokens.authorization("c") == "Bearer t4"  # and b is the oldest now
    assert [await tokens.authorization(scope) for scope in "acb"] == ["Bearer t3", "Bearer t4", "Bearer t5"]


# Refusals


@pytest.mark.parametrize("challenges", [[BEARER], []], ids=["401", "403 without a challenge"])
async def test_a_refused_token_is_renewed(tokens: TokenCache, realm: Realm, challenges: list[str]) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    assert await tokens.renew(SCOPE, challenges, "Bearer t1") == "Bearer t2"
    assert await tokens.authorization(SCOPE) == "Bearer t2"
    assert len(realm.requests) == 2


async def test_a_refused_token_is_not_used_again(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    realm.answers = [OriginFailed("connection refused")]
    with pytest.raises(OriginFailed):
        await tokens.renew(SCOPE, [BEARER], "Bearer t1")
    assert await tokens.authorization(SCOPE) == "Bearer t2"


async def test_what_another_has_renewed_is_taken(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"
    await tokens.renew(SCOPE, [BEARER], "Bearer t1")
    assert await tokens.renew(SCOPE, [BEARER], "Bearer t1") == "Bearer t2"
    assert len(realm.requests) == 2


@pytest.mark.parametrize("challenges", [[], ["Negotiate"], ["@"], [BASIC]])
async def test_nothing_to_try(tokens: TokenCache, realm: Realm, challenges: list[str]) -> None:
    assert await tokens.renew(SCOPE, challenges, None) is None
    assert realm.requests == []


async def test_a_403_to_nobody_stands(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew("repository:other:pull", [BEARER], None)
    assert await tokens.renew(SCOPE, [], None) is None
    assert len(realm.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_a_realm_that_refuses_credentials_is_asked_with_new_ones(realm: Realm, status: int) -> None:
    tokens = TokenCache(HUB, Rotating(), realm)
    realm.answers = [TokenResponse(status, b"")]
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"
    assert [request[2] for request in realm.requests] == [basic("ci", "p0"), basic("ci", "p1")]


async def test_a_realm_that_refuses_new_credentials_too(realm: Realm) -> None:
    tokens = TokenCache(HUB, Rotating(), realm)
    realm.answers = [TokenResponse(401, b""), TokenResponse(403, b"")]
    with pytest.raises(OriginDenied, match=r"auth\.docker\.io/token refuses the configured credentials.*403"):
        await tokens.renew(SCOPE, [BEARER], None)
    assert len(realm.requests) == 2


@pytest.mark.parametrize(
    ("credentials", "message"),
    [(Inline("ci", "hush"), "refuses the configured credentials"), (Credentials(), "without credentials")],
)
async def test_the_same_credentials_are_not_tried_twice(
    realm: Realm, credentials: Credentials, message: str
) -> None:
    tokens = TokenCache(HUB, credentials, realm)
    realm.answers = [TokenResponse(401, b"hush")]
    with pytest.raises(OriginDenied, match=message) as caught:
        await tokens.renew(SCOPE, [BEARER], None)
    assert "hush" not in str(caught.value)
    assert len(realm.requests) == 1
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"  # a refusal is not remembered


async def test_credentials_that_cannot_be_read(realm: Realm) -> None:
    class Broken(Credentials):
        async def get(self, host: str, repository: str = "") -> Credential | None:
            raise OriginDenied("password file /run/secret: it is empty")

    tokens = TokenCache(HUB, Broken(), realm)
    for challenge in (BEARER, BASIC):
        with pytest.raises(OriginDenied, match="/run/secret"):
            await tokens.renew(SCOPE, [challenge], None)
    assert realm.requests == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (TokenResponse(429, b"", 7.0), TooManyRequests),
        (TokenResponse(500, b"", 7.0), OriginFailed),
        (TokenResponse(404, b"", 7.0), OriginFailed),
        (TokenResponse(307, b"", 7.0), OriginFailed),
    ],
)
async def test_statuses_of_a_realm(
    tokens: TokenCache, realm: Realm, answer: TokenResponse, error: type[OriginFailed]
) -> None:
    realm.answers = [answer]
    with pytest.raises(error, match=r"token realm https://auth\.docker\.io/token ") as caught:
        await tokens.renew(SCOPE, [BEARER], None)
    assert type(caught.value) is error
    assert caught.value.retry_after == 7.0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"token": ""}',
        b'{"token": 1}',
        b'{"token": "a\\r\\nb"}',
        b'{"token": "\xff"}',
    ],
)
async def test_what_is_no_token(tokens: TokenCache, realm: Realm, content: bytes) -> None:
    realm.answers = [TokenResponse(200, content)]
    with pytest.raises(OriginFailed, match="answered without a token"):
        await tokens.renew(SCOPE, [BEARER], None)
    assert await tokens.authorization(SCOPE) is None


async def test_requests_are_counted(realm: Realm) -> None:
    counted: list[str] = []
    tokens = TokenCache(HUB, Rotating(), realm, on_fetch=counted.append)
    realm.answers = [
        TokenResponse(401, b""),
        issue(token="t"),
        TokenResponse(500, b""),
        OriginTimeout("slow"),
    ]
    await tokens.renew(SCOPE, [BEARER], None)
    await tokens.renew(SCOPE, [BEARER], "Bearer t1")
    for error in (OriginFailed, OriginTimeout):
        with pytest.raises(error):
            await tokens.renew(SCOPE, [BEARER], "Bearer t")
    assert counted == ["denied", "ok", "failed", "failed"]


# A realm that moves


@pytest.mark.parametrize(
    "answer", [TokenResponse(404, b""), TokenResponse(401, b""), OriginFailed("refused")]
)
async def test_a_realm_that_fails_is_forgotten(
    tokens: TokenCache, realm: Realm, answer: TokenResponse | Exception
) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    realm.answers = [answer]
    assert await tokens.authorization("repository:a:pull") is None
    assert await tokens.authorization("repository:a:pull") is None
    moved = 'Bearer realm="https://new.docker.io/token"'
    assert await tokens.renew("repository:a:pull", [moved], None) == "Bearer t2"
    assert await tokens.authorization("repository:b:pull") == "Bearer t3"
    assert [request[1].host for request in realm.requests] == ["auth.docker.io"] * 2 + ["new.docker.io"] * 2


async def test_a_realm_that_is_silent_is_forgotten(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    realm.answers = [OriginTimeout("slow")]
    with pytest.raises(OriginTimeout):
        await tokens.authorization("repository:a:pull")
    assert await tokens.authorization("repository:a:pull") is None


async def test_a_realm_that_is_busy_is_kept(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    realm.answers = [TokenResponse(429, b"", 7.0)]
    with pytest.raises(TooManyRequests):
        await tokens.authorization("repository:a:pull")
    assert await tokens.authorization("repository:a:pull") == "Bearer t2"


# Basic


async def test_basic(realm: Realm) -> None:
    tokens = TokenCache(HUB, Inline("ci", "secret"), realm)
    assert await tokens.authorization(SCOPE) is None
    assert await tokens.renew(SCOPE, [BASIC], None) == basic("ci", "secret")
    assert await tokens.authorization("repository:other:pull") == basic("ci", "secret")
    assert realm.requests == []


@pytest.mark.parametrize("challenges", [[BASIC], []], ids=["401", "403"])
async def test_refused_basic(realm: Realm, challenges: list[str]) -> None:
    tokens = TokenCache(HUB, Rotating(last=1), realm)
    assert await tokens.renew(SCOPE, [BASIC], None) == basic("ci", "p0")
    assert await tokens.renew(SCOPE, challenges, basic("ci", "p0")) == basic("ci", "p1")
    assert await tokens.authorization(SCOPE) == basic("ci", "p1")
    assert await tokens.renew(SCOPE, challenges, basic("ci", "p0")) == basic("ci", "p1")
    assert await tokens.renew(SCOPE, challenges, basic("ci", "p1")) is None


async def test_bearer_goes_before_basic(realm: Realm) -> None:
    tokens = TokenCache(HUB, Inline("ci", "secret"), realm)
    assert await tokens.renew(SCOPE, [f"{BASIC}, {BEARER}"], None) == "Bearer t1"


async def test_both_without_credentials(tokens: TokenCache) -> None:
    assert await tokens.renew(SCOPE, [BASIC, BEARER], None) == "Bearer t1"


@pytest.mark.parametrize("bearer", ["Bearer", 'Bearer realm="https://evil.example/token"'])
async def test_basic_where_the_realm_is_none(realm: Realm, bearer: str) -> None:
    tokens = TokenCache(HUB, Inline("ci", "secret"), realm)
    with capture_logs():
        assert await tokens.renew(SCOPE, [bearer, BASIC], None) == basic("ci", "secret")
    assert realm.requests == []


async def test_an_upstream_that_changes_its_scheme(realm: Realm) -> None:
    tokens = TokenCache(HUB, Inline("ci", "secret"), realm)
    await tokens.renew(SCOPE, [BASIC], None)
    assert await tokens.renew(SCOPE, [BEARER], basic("ci", "secret")) == "Bearer t1"
    assert await tokens.authorization("repository:other:pull") == "Bearer t2"
    assert await tokens.renew(SCOPE, [BASIC], "Bearer t1") == basic("ci", "secret")
    assert await tokens.authorization("repository:third:pull") == basic("ci", "secret")


# Realms that are not asked


@pytest.mark.parametrize(
    ("credentials", "address"),
    [
        (Inline("ci", "secret"), "https://evil.example/token"),
        *(
            (each, address)
            for each in (Credentials(), Inline("ci", "secret"))
            for address in (
                "http://auth.docker.io/token",
                "http://evil.example/token",
                "https://user:word@evil.example/token",
                "https://a\\@b/",
                "https://h:99999/",
                "",
            )
        ),
    ],
)
async def test_a_realm_elsewhere_is_not_asked(realm: Realm, credentials: Credentials, address: str) -> None:
    tokens = TokenCache(HUB, credentials, realm)
    quoted = address.replace("\\", "\\\\")
    with capture_logs() as events, pytest.raises(OriginDenied, match="token_realms") as caught:
        await tokens.renew(SCOPE, [f'Bearer realm="{quoted}"'], None)
    assert HUB in str(caught.value)
    assert repr(address) in str(caught.value)
    assert events == [{"event": "token.realm_refused", "log_level": "warning", "host": HUB, "realm": address}]
    assert realm.requests == []


async def test_an_anonymous_token_from_a_realm_elsewhere(tokens: TokenCache, realm: Realm) -> None:
    challenge = f'Bearer realm="https://login.vendor.example/t",service="s",scope="{SCOPE}"'
    assert await tokens.renew(SCOPE, [challenge], None) == "Bearer t1"
    url = URL("https://login.vendor.example/t").with_query([("service", "s"), ("scope", SCOPE)])
    assert realm.requests == [("GET", url, None, None)]
    assert await tokens.authorization("repository:other:pull") == "Bearer t2"


async def test_a_realm_that_issued_anonymous_tokens_gets_no_credentials_later(realm: Realm) -> None:
    class Late(Credentials):
        found: Credential | None = None

        async def get(self, host: str, repository: str = "") -> Credential | None:
            return self.found

    late = Late()
    tokens = TokenCache(HUB, late, realm)
    challenge = ['Bearer realm="https://login.vendor.example/t"']
    assert await tokens.renew(SCOPE, challenge, None) == "Bearer t1"
    late.found = Credential("ci", "secret")
    assert await tokens.authorization("repository:other:pull") is None
    with pytest.raises(OriginDenied, match="token_realms"):
        await tokens.renew("repository:other:pull", challenge, None)
    assert len(realm.requests) == 1


async def test_realms_the_operator_allows(realm: Realm) -> None:
    tokens = TokenCache(
        "localhost:5000", Credentials(), realm, allowed_realms=["login.example"], plain_http=True
    )
    for scope, address in (("a", "http://localhost:5001/token"), ("b", "http://login.example/token")):
        await tokens.renew(scope, [f'Bearer realm="{address}"'], None)
    assert [request[1].host for request in realm.requests] == ["localhost", "login.example"]


# Many at once


async def test_one_request_for_all_who_wait(tokens: TokenCache, realm: Realm) -> None:
    realm.gate.clear()
    waiters = [asyncio.create_task(tokens.renew(SCOPE, [BEARER], None)) for _ in range(50)]
    await realm.asked.wait()
    realm.gate.set()
    assert await asyncio.gather(*waiters) == ["Bearer t1"] * 50
    assert len(realm.requests) == 1


async def test_one_renewal_for_all_who_were_refused(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    waiters = [tokens.renew(SCOPE, [BEARER], "Bearer t1") for _ in range(50)]
    assert await asyncio.gather(*waiters) == ["Bearer t2"] * 50
    assert len(realm.requests) == 2


async def test_one_request_when_a_token_has_lapsed(tokens: TokenCache, realm: Realm, clock: Clock) -> None:
    await tokens.renew(SCOPE, [BEARER], None)
    clock.advance(300)
    assert await asyncio.gather(*(tokens.authorization(SCOPE) for _ in range(50))) == ["Bearer t2"] * 50
    assert len(realm.requests) == 2


async def test_scopes_do_not_wait_for_each_other(tokens: TokenCache, realm: Realm) -> None:
    realm.gate.clear()
    scopes = [f"repository:r{number}:pull" for number in range(5)]
    waiters = [asyncio.create_task(tokens.renew(scope, [BEARER], None)) for scope in scopes]
    while len(realm.requests) < 5:
        realm.asked.clear()
        await realm.asked.wait()
    realm.gate.set()
    assert sorted(str(value) for value in await asyncio.gather(*waiters)) == [
        f"Bearer t{n}" for n in range(1, 6)
    ]


async def test_the_first_waiter_leaves(tokens: TokenCache, realm: Realm) -> None:
    realm.gate.clear()
    first, second = (asyncio.create_task(tokens.renew(SCOPE, [BEARER], None)) for _ in range(2))
    await realm.asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    realm.gate.set()
    assert await second == "Bearer t1"
    assert len(realm.requests) == 1


async def test_an_error_reaches_all_who_wait(tokens: TokenCache, realm: Realm) -> None:
    realm.answers = [OriginFailed("connection refused")]
    waiters = [tokens.renew(SCOPE, [BEARER], None) for _ in range(50)]
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OriginFailed] * 50
    assert len(realm.requests) == 1
    assert await tokens.renew(SCOPE, [BEARER], None) == "Bearer t1"


async def test_a_new_challenge_does_not_wait_for_the_old_realm(tokens: TokenCache, realm: Realm) -> None:
    await tokens.renew("repository:other:pull", [BEARER], None)
    realm.asked.clear()
    realm.gate.clear()
    old = asyncio.create_task(tokens.authorization(SCOPE))
    await realm.asked.wait()
    realm.asked.clear()
    new = asyncio.create_task(tokens.renew(SCOPE, ['Bearer realm="https://new.docker.io/token"'], None))
    await realm.asked.wait()
    realm.gate.set()
    assert {await old, await new} == {"Bearer t2", "Bearer t3"}
    assert [request[1].host for request in realm.requests[1:]] == ["auth.docker.io", "new.docker.io"]


async def test_close_ends_what_is_under_way(tokens: TokenCache, realm: Realm) -> None:
    realm.gate.clear()
    waiter = asyncio.create_task(tokens.renew(SCOPE, [BEARER], None))
    await realm.asked.wait()
    await tokens.close()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert asyncio.all_tasks() == {asyncio.current_task()}
