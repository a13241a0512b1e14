"""Texts of configurations for tests, and what the loader says of them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proxy.config.access import AccessConfig, AccessRule, TokenService
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.oidc import OIDCIssuer
from proxy.config.peers import PeersConfig
from proxy.config.policy import MoveRule, PolicyConfig, PolicyRule
from proxy.config.schema import (
    TLS,
    Config,
    DiskConfig,
    Log,
    NamespaceConfig,
    TagRule,
    WarmRule,
)
from proxy.config.shared import SharedConfig
from proxy.config.signers import AttestationConfig, SignerConfig
from proxy.config.upstream import Login, UpstreamConfig
from proxy.config.webhooks import WebhookConfig

TOKENS = dict.fromkeys(
    (
        "HUB_TOKEN",
        "ADMIN_TOKEN",
        "DEPLOY_TOKEN",
        "DEPLOY_SECRET",
        "AUDIT_TOKEN",
        "DB_PASSWORD",
        "S3_SECRET",
        "S3_TOKEN",
        "PEERS_SECRET",
    ),
    "a-text-of-the-tests",
)
HOOK = "name: a, url: 'https://h.example/hook?token=hunter2'"
TOKEN = "token: {realm: 'https://auth.example/token', service: s, issuer: i, keys: [/k.pem]}"
SECTIONS = (
    AccessConfig,
    AccessRule,
    AttestationConfig,
    TokenService,
    Config,
    WarmRule,
    DiskConfig,
    Log,
    Login,
    MoveRule,
    NamespaceConfig,
    OIDCIssuer,
    PolicyConfig,
    PolicyRule,
    PeersConfig,
    SharedConfig,
    SignerConfig,
    TagRule,
    TLS,
    UpstreamConfig,
    WebhookConfig,
)


def namespace(members: str, name: str = "x") -> str:
    return f"namespaces: {{{name}: {{upstream: https://x.example, {members}}}}}"


def upstream(members: str) -> str:
    return f"namespaces: {{x: {{upstream: {{{members}}}}}}}"


def at(members: str) -> str:
    return upstream(f"url: https://x.example, {members}")


def webhook(members: str = HOOK) -> str:
    return f"webhooks: [{{{members}}}]"


def access(members: str, namespaces: str = "local: {store: {}}") -> str:
    return f"namespaces: {{{namespaces}}}\naccess: {{{members}}}"


def read(text: str, **environ: str) -> Config:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "entrepot.yml"
        path.write_text(text, encoding="utf-8")
        return load(path, environ)


def fault(text: str, **environ: str) -> str:
    """The one line that `text` is refused with, without the file's name before it."""
    with pytest.raises(ConfigError) as caught:
        read(text, **environ)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    hidden = caught.value.__suppress_context__ or caught.value.__context__ is None
    assert hidden, "a traceback would show values"
    start, name, cause = line.partition("entrepot.yml")
    assert name
    assert ":" not in start
    return cause.removeprefix(": ")
