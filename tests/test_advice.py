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
    (line,) = said(users, top="listen: ':7000'\nadmin: '127.0.0.1:7001'")
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
