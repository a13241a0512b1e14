"""Tokens: whose count, and every way in which one may not."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jws
from joserfc.jwk import ECKey, JWKRegistry, OctKey, OKPKey, RSAKey
from structlog.testing import LogCapture

from proxy.access import bearer as module
from proxy.access.bearer import LEEWAY, BadToken, TokenVerifier, VerificationKey, parse_keys
from proxy.access.rules import Grant
from tests.conftest import Clock

pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")

PRIVATE: dict[str, Any] = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "EC": ec.generate_private_key(ec.SECP256R1()),
    "OKP": ed25519.Ed25519PrivateKey.generate(),
}
OTHER = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def private_pem(key: Any) -> bytes:
    private: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private


def jose(key: Any, kind: str = "EC") -> VerificationKey:
    imported = JWKRegistry.import_key(private_pem(key), kind)  # type: ignore[call-overload]
    assert isinstance(imported, RSAKey | ECKey | OKPKey)
    return imported


def jwk(key: Any, kind: str, **more: str) -> dict[str, Any]:
    return {**jose(key, kind).as_dict(private=False), **more}


def certificate(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "token server")])
    start = datetime.datetime(2020, 1, 1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start.replace(year=2021))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.pem"
    path.write_bytes(b"".join(map(pem, PRIVATE.values())))
    return path


@pytest.fixture
def tokens(path: Path, clock: Clock) -> TokenVerifier:
    return TokenVerifier("registry.example", "auth.example", [path], clock)


class Server:
    """Issues tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def claims(self, **given: Any) -> dict[str, Any]:
        now = self._clock.now
        claims = {
            "iss": "auth.example",
            "aud": "registry.example",
            "sub": "alice",
            "exp": now + 300,
            "nbf": now,
        }
        return {name: value for name, value in {**claims, **given}.items() if value is not None}

    def issue(
        self,
        key: Any = PRIVATE["EC"],
        algorithm: str = "ES256",
        kind: str = "EC",
        header: dict[str, Any] | None = None,
        **given: Any,
    ) -> str:
        headers = {"typ": "JWT", "alg": algorithm, **(header or {})}
        payload = json.dumps(self.claims(**given))
        registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
        return jws.serialize_compact(headers, payload, jose(key, kind), [algorithm], registry=registry)


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock)


def forged(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """Signed with our RSA key, whatever is in the header."""
    signed = ".".join(encoded(json.dumps(each).encode()) for each in (header, claims))
    return f"{signed}.{encoded(PRIVATE['RSA'].sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def refused(tokens: TokenVerifier, token: str) -> str:
    with pytest.raises(BadToken) as raised:
        tokens.verify(token)
    return str(raised.value)


# Whose count


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [
        *(("RSA", each) for each in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        ("EC", "ES256"),
        ("OKP", "EdDSA"),
        ("OKP", "Ed25519"),
    ],
)
def test_every_algorithm(tokens: TokenVerifier, server: Server, kind: str, algorithm: str) -> None:
    principal = tokens.verify(server.issue(PRIVATE[kind], algorithm, kind))
    assert (principal.user, principal.scheme, principal.grants) == ("alice", "token", ())
    assert not principal.known
    assert not principal.anonymous


def test_what_it_grants(tokens: TokenVerifier, server: Server) -> None:
    access = [
        {"type": "repository", "name": "team/app", "actions": ["pull", "push"]},
        {"type": "repository", "class": "image", "name": "team/all", "actions": ["*"]},
        {"type": "registry", "name": "catalog", "actions": ["*"]},
        {"type": "repository(plugin)", "name": "team/plugin", "actions": ["pull"]},
        {"type": "repository", "name": "team/none", "actions": None},
        {"type": "repository", "name": 7, "actions": ["pull"]},
        "nonsense",
    ]
    principal = tokens.verify(server.issue(access=access))
    assert principal.grants == (
        Grant("team/app", frozenset({"pull", "push"})),
        Grant("team/all", frozenset({"*"})),
        Grant("registry:catalog", frozenset({"*"})),
        Grant("team/none", frozenset()),
    )


@pytest.mark.parametrize("access", [None, [], {}, "all", 7])
def test_nothing_grants_nothing(tokens: TokenVerifier, server: Server, access: object) -> None:
    assert tokens.verify(server.issue(access=access)).grants == ()


def test_claims_are_there_for_rules(tokens: TokenVerifier, server: Server) -> None:
    assert tokens.verify(server.issue(project="team/app")).claims["project"] == "team/app"


def test_nobody_in_particular_may_have_one(tokens: TokenVerifier, server: Server) -> None:
    assert tokens.verify(server.issue(sub=None)).user == ""
    assert tokens.verify(server.issue(sub="")).user == ""


@pytest.mark.parametrize("audience", ["registry.example", ["other.example", "registry.example"]])
def test_for_us(tokens: TokenVerifier, server: Server, audience: object) -> None:
    assert tokens.verify(server.issue(aud=audience))


@pytest.mark.parametrize("kid", [None, "PYYO:TEWU:V7JH:26JV:AQTZ:LJC3:SXVJ:XGHA:34F2:2LAQ:ZRMK:Z7Q6", ""])
def test_however_the_key_is_called(tokens: TokenVerifier, server: Server, kid: str | None) -> None:
    assert tokens.verify(server.issue(header={} if kid is None else {"kid": kid}))


@pytest.mark.parametrize("kind", ["RSA", "EC", "OKP"])
def test_keys_of_every_form(path: Path, clock: Clock, server: Server, kind: str) -> None:
    key = PRIVATE[kind]
    algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[kind]
    one = jwk(key, kind, kid="one", use="sig")
    forms = [
        pem(key),
        b"text before\n" + pem(OTHER) + b"\n# and between\n" + pem(key),
        json.dumps(one).encode(),
        json.dumps({"keys": [jwk(OTHER, "EC"), {"kty": "oct", "use": "enc", "k": "AAAA"}, one]}).encode(),
    ]
    forms += [certificate(key)] if kind != "OKP" else []
    for form in forms:
        path.write_bytes(form)
        tokens = TokenVerifier("registry.example", "auth.example", [path], clock)
        assert tokens.verify(server.issue(key, algorithm, kind))
        assert tokens.verify(server.issue(key, algorithm, kind, header={"kid": "one"}))


def test_several_files(path: Path, clock: Clock, server: Server) -> None:
    other = path.with_name("other.json")
    other.write_text(json.dumps(jwk(OTHER, "EC")))
    tokens = TokenVerifier("registry.example", "auth.example", [path, other], clock)
    assert tokens.verify(server.issue(OTHER))
    assert tokens.verify(server.issue())


# Whose do not


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"iss": "evil.example"}, "its issuer is not auth.example"),
        ({"iss": None}, "one of the claims iss, aud and exp is missing"),
        ({"aud": "other.example"}, "it is not for the service registry.example"),
        ({"aud": ["other.example"]}, "it is not for the service registry.example"),
        ({"aud": []}, "it is not for the service registry.example"),
        ({"aud": None}, "one of the claims iss, aud and exp is missing"),
        ({"aud": 7}, "one of the claims iss, aud and exp is missing"),
        ({"exp": None}, "one of the claims iss, aud and exp is missing"),
        ({"exp": "never"}, "one of the claims iss, aud and exp is missing"),
    ],
)
def test_claims_that_do_not_fit(
    tokens: TokenVerifier, server: Server, given: dict[str, Any], reason: str
) -> None:
    assert reason in refused(tokens, server.issue(**given))


def test_times(tokens: TokenVerifier, server: Server, clock: Clock) -> None:
    now = clock.now
    token = server.issue(exp=now + 100)
    clock.advance(100 + LEEWAY - 1)
    assert tokens.verify(token)
    clock.advance(1)
    assert refused(tokens, token) == "it has expired"
    assert refused(tokens, token) == "it has expired"
    clock.now = now
    for claim in ("nbf", "iat"):
        assert tokens.verify(server.issue(**{claim: now + LEEWAY}))
        early = server.issue(**{claim: now + LEEWAY + 1})
        assert refused(tokens, early) == "it is not valid yet"
        clock.advance(1)
        assert tokens.verify(early)
        clock.now = now


def test_another_key(tokens: TokenVerifier, server: Server) -> None:
    assert "no configured key" in refused(tokens, server.issue(OTHER))


def test_a_key_that_it_brings_along_is_not_looked_at(tokens: TokenVerifier, server: Server) -> None:
    cert = encoded(certificate(OTHER))
    for header in ({"jwk": jwk(OTHER, "EC")}, {"jku": "https://evil.example/keys"}, {"x5c": [cert]}):
        assert refused(tokens, server.issue(OTHER, header=header))


def test_long_headers_and_signatures(tokens: TokenVerifier, server: Server) -> None:
    # Token servers send the chain of their certificates along.
    chain = [base64.b64encode(certificate(PRIVATE["EC"])).decode()] * 4
    for header in ({"x5c": chain}, {"kid": "k" * 700}):
        assert tokens.verify(server.issue(header=header)).user == "alice"
    assert "no configured key" in refused(tokens, server.issue(OTHER, header={"x5c": chain}))
    start, _, _ = server.issue(PRIVATE["RSA"], "RS256", "RSA").rpartition(".")
    assert "no configured key" in refused(tokens, f"{start}.{encoded(b's' * 1024)}")  # of 8192 bits


def test_unsigned(tokens: TokenVerifier, server: Server) -> None:
    payload = encoded(json.dumps(server.claims()).encode())
    for algorithm in ("none", "None", "", None, 7, ["ES256"]):
        header = encoded(json.dumps({"typ": "JWT", "alg": algorithm}).encode())
        assert refused(tokens, f"{header}.{payload}.")
        assert refused(tokens, f"{header}.{payload}.AAAA")


def test_a_public_key_is_no_shared_secret(tokens: TokenVerifier, server: Server) -> None:
    for kind, private in PRIVATE.items():
        for secret in (pem(private), json.dumps(jwk(private, kind)).encode()):
            header = encoded(json.dumps({"typ": "JWT", "alg": "HS256"}).encode())
            signed = f"{header}.{encoded(json.dumps(server.claims()).encode())}"
            signature = hmac.digest(secret, signed.encode(), hashlib.sha256)
            assert refused(tokens, f"{signed}.{encoded(signature)}")


def test_an_algorithm_of_another_kind_of_key(tokens: TokenVerifier, server: Server, path: Path) -> None:
    path.write_bytes(pem(PRIVATE["EC"]))
    assert refused(tokens, server.issue(PRIVATE["RSA"], "RS256", "RSA"))
    token = server.issue()
    header = encoded(json.dumps({"typ": "JWT", "alg": "RS256"}).encode())
    assert refused(tokens, f"{header}.{token.partition('.')[2]}")


def test_changed(tokens: TokenVerifier, server: Server) -> None:
    header, payload, signature = server.issue().split(".")
    other = encoded(json.dumps(server.claims(sub="root")).encode())
    assert refused(tokens, f"{header}.{other}.{signature}")
    assert refused(tokens, f"{header}.{payload}.{signature[:-4]}AAAA")
    assert refused(tokens, f"{header}.{payload}.")
    assert refused(tokens, f"{header}.{payload}")


@pytest.mark.parametrize(
    "header",
    [{"kid": 7}, {"crit": ["exp"], "exp": 1}, {"crit": ["b64"], "b64": False}, {"crit": "exp"}],
)
def test_headers_that_are_not_understood(
    tokens: TokenVerifier, server: Server, header: dict[str, Any]
) -> None:
    assert tokens.verify(forged({"alg": "RS256", "unheard": "of"}, server.claims()))
    assert refused(tokens, forged({"alg": "RS256", **header}, server.claims()))


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b.c", "e30.e30.", "é.b.c", "x" * 7000, "\udcff", "a.b.c.d.e", "W10.e30.AAAA"]
)
def test_what_is_none(tokens: TokenVerifier, token: str) -> None:
    assert refused(tokens, token)


def test_a_payload_that_is_none(tokens: TokenVerifier) -> None:
    for payload in (b"", b"[]", b"\xff", b"null", b"[" * 100_000):
        token = jws.serialize_compact({"alg": "ES256"}, payload, jose(PRIVATE["EC"]), ["ES256"])
        assert refused(tokens, token)


def test_no_error_shows_a_token(tokens: TokenVerifier, server: Server) -> None:
    token = server.issue(aud="other.example")
    assert not any(part in refused(tokens, token) for part in token.split("."))


# Change


def test_keys_are_read_again(tokens: TokenVerifier, server: Server, path: Path) -> None:
    token = server.issue()
    assert tokens.verify(token)
    path.write_bytes(pem(OTHER))
    assert "no configured key" in refused(tokens, token)
    assert tokens.verify(server.issue(OTHER))


@pytest.mark.errors("keys.failed")
def test_keys_that_are_gone_count_no_more(
    tokens: TokenVerifier, server: Server, path: Path, events: LogCapture
) -> None:
    token = server.issue()
    assert tokens.verify(token)
    content = path.read_bytes()
    path.unlink()
    assert refused(tokens, token)
    assert refused(tokens, token)
    path.write_text("nothing")
    assert refused(tokens, token)
    assert [each["reason"] for each in events.entries] == [
        "No such file or directory",
        "it holds no key: expected PEM, a JWK or a JWKS",
    ]
    path.write_bytes(content)
    assert tokens.verify(token)


def test_memory_is_bounded(tokens: TokenVerifier, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    for number in range(10):
        tokens.verify(server.issue(sub=str(number)))
    assert len(tokens._known) == 3


def test_a_signature_is_verified_once(
    tokens: TokenVerifier, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = server.issue()
    first = tokens.verify(token)
    monkeypatch.setattr(module, "deserialize_compact", None)
    assert tokens.verify(token) is first


# Files that are none


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "it holds no key"),
        (b"{", "it is not JSON"),
        (b"{}", "not of type RSA, EC or OKP"),
        (b'{"keys": []}', "it holds no key"),
        (b'{"keys": [7]}', "not of type RSA, EC or OKP"),
        (b'{"keys": 7}', "keys is not a list"),
        (json.dumps(OctKey.generate_key().as_dict()).encode(), "shared secrets are not accepted"),
        (json.dumps(jose(OTHER).as_dict(private=True)).encode(), "it holds a private key"),
        (private_pem(OTHER), "it holds a private key"),
        (b'{"kty": "EC", "crv": "P-256"}', "a key of type EC that cannot be read"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "its PUBLIC KEY cannot be read"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "its CERTIFICATE cannot be read"),
        (pem(x25519.X25519PrivateKey.generate()), "its PUBLIC KEY cannot be read"),
    ],
    ids=[
        *("nothing", "no JSON", "no key type", "no key", "a number", "no list", "a shared secret"),
        *("a private JWK", "a private PEM", "half a JWK", "no PEM key", "no PEM certificate", "X25519"),
    ],
)
def test_bad_keys(path: Path, content: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        parse_keys(content)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        TokenVerifier("s", "i", [path])
