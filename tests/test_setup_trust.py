"""Setup says when a client would refuse the server's certificate, and what to do."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from yarl import URL

from proxy.cli.main import main
from proxy.config.schema import TLS
from proxy.setup.renderers import RENDERERS
from proxy.setup.site import Site
from proxy.setup.trust import trust_warnings
from tests.authority import Authority

HOST = "cache.example"
SITE = Site(URL(f"https://{HOST}:5000"))


def issued(authority: Authority, *names: str, expires: float | None = None) -> TLS:
    own = authority.issue("server", *(names or (HOST,)), expires=expires)
    return TLS(certificate=Path(own["certificate"]), key=Path(own["key"]))


def warned(tls: TLS | None, ca: Path | None = None, client: str = "docker", site: Site = SITE) -> list[str]:
    return trust_warnings(RENDERERS[client](site), site, tls, ca)


def test_an_authority_that_nobody_knows(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path, "mine"), Authority(tmp_path, "other")
    tls = issued(authority)
    (warning,) = warned(tls)
    assert "docker will refuse https://cache.example:5000: its certificate is from an authority" in warning
    assert "name it in --ca-file: openssl s_client -showcerts -connect cache.example:5000" in warning
    assert warned(tls, authority.ca) == []
    (warning,) = warned(tls, other.ca)
    assert "not trusted here" in warning


@pytest.mark.parametrize(
    ("names", "url", "says"),
    [
        (("other.example",), SITE.url, "its certificate is for other.example, not for cache.example"),
        (("cache.example", "*.cache.example"), "https://a.b.cache.example", "not for a.b.cache.example"),
        (("cache.example",), "https://192.0.2.1:5000", "not for 192.0.2.1"),
        (("192.0.2.1",), "https://192.0.2.1:5000", ""),
        (("cache.example",), "https://cache.example", ""),
    ],
)
def test_a_certificate_for_another_name(tmp_path: Path, names: tuple[str, ...], url: URL, says: str) -> None:
    authority = Authority(tmp_path)
    found = warned(issued(authority, *names), authority.ca, site=Site(URL(url)))
    assert [says in each for each in found] == ([True] if says else [])


def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    (warning,) = warned(issued(authority, expires=time.time() - 86400), authority.ca)
    assert "its certificate expired on" in warning and "have it renewed" in warning


def test_a_certificate_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on a client's machine, or behind another server's TLS.  Nobody is asked for a password."""
    authority = Authority(tmp_path)
    tls = issued(authority)
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key((tmp_path / "server.key").read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for each in (None, TLS(certificate=tmp_path / "none"), TLS(certificate=tls.certificate, key=locked)):
        (warning,) = warned(each)
        assert warning.startswith("unless the certificate of cache.example:5000 is from a public authority")
        assert warned(each, authority.ca) == []
    assert warned(tls, site=Site(URL("http://cache.example:5000"))) == []


@pytest.mark.parametrize("client", RENDERERS)
def test_each_client_gets_the_authority_or_is_told_how(tmp_path: Path, client: str) -> None:
    authority = Authority(tmp_path)
    site = Site(SITE.url, ca=authority.ca.read_text(), aliases={"registry.ollama.ai": "ollama"})
    setup = RENDERERS[client](site)
    told = warned(issued(authority), authority.ca, client, site)
    if setup.trust:
        assert len(told) == 1 and str(authority.ca) in told[0] and "FILE" not in told[0]
    else:
        assert told == []
        text = "".join("".join(each.content for each in setup.pieces).split())
        known = ("".join((site.ca or "").split()), base64.b64encode((site.ca or "").encode()).decode())
        assert any(each in text for each in known) or client == "kaniko"  # which gets a flag


def test_the_command_prints_it(tmp_path: Path) -> None:
    own = Authority(tmp_path).issue("server", HOST)
    config = tmp_path / "entrepot.yml"
    config.write_text(f"tls: {{certificate: {own['certificate']}, key: {own['key']}}}\n")
    root = tmp_path / "root"
    root.mkdir()
    command = ["setup", "docker", "-c", str(config), "--url", f"https://{HOST}:5000", "--root", str(root)]
    printed = CliRunner().invoke(main, command)
    assert "# warning: docker will refuse https://cache.example:5000: " in printed.stdout
    for words, output in (("--write", 0), ("--remove", 0)):
        done = CliRunner().invoke(main, [*command, words])
        assert done.exit_code == output
        assert ("warning: docker will refuse" in done.stderr) == (words == "--write")
