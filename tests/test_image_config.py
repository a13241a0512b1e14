"""Configurations of images: what they say, whatever their form, to the page and in a comparison."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admin import image_config
from proxy.admin.image_config import ImageConfig, layer_steps, parse_config
from proxy.admin.models import BuildStep
from tests.test_operations import ALPINE, Site, settings, site  # noqa: F401
from tests.test_tag_history import config, image

ALL = {
    "os": "windows",
    "os.version": "10.0.20348",
    "architecture": "amd64",
    "variant": "v2",
    "created": "2024-05-06T07:08:09Z",
    "author": "somebody",
    "config": {
        "User": "app",
        "WorkingDir": "/srv",
        "StopSignal": "SIGINT",
        "ArgsEscaped": True,
        "Entrypoint": ["/bin/app", "a b"],
        "Cmd": ["run"],
        "Shell": ["cmd", "/S"],
        "Env": ["A=1"],
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}},
        "Labels": {"team": "shop"},
    },
    "history": [{"created": "1970-01-01T00:00:05Z", "created_by": "ADD", "comment": "c"}],
}


def test_everything_that_is_read() -> None:
    found = parse_config(json.dumps(ALL).encode())
    assert found == ImageConfig(
        created="2024-05-06T07:08:09Z",
        author="somebody",
        os="windows",
        os_version="10.0.20348",
        architecture="amd64",
        variant="v2",
        user="app",
        directory="/srv",
        stop_signal="SIGINT",
        args_escaped="true",
        entrypoint=["/bin/app", "a b"],
        command=["run"],
        shell=["cmd", "/S"],
        environment=["A=1"],
        ports=["80/tcp"],
        volumes=["/data"],
        labels={"team": "shop"},
        history=[BuildStep(created=5.0, created_by="ADD", comment="c", empty=False)],
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_configuration_that_is_none(content: bytes) -> None:
    assert parse_config(content) is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, ImageConfig()),
        ({"config": None, "history": None}, ImageConfig()),
        ({"config": 3, "history": {}, "os": 5, "author": ["x"]}, ImageConfig()),
        (
            {"config": {"Env": [1, "A"], "Labels": ["x"], "Cmd": "sh", "User": None}},
            ImageConfig(environment=["1", "A"]),
        ),
        (
            {"config": {"Labels": {"a": None, "b": {"c": 1}}, "Entrypoint": [1], "ArgsEscaped": False}},
            ImageConfig(labels={"a": "", "b": '{"c":1}'}, entrypoint=["1"]),
        ),
    ],
)
def test_a_configuration_of_a_strange_form(content: Any, found: ImageConfig) -> None:
    assert parse_config(json.dumps(content).encode()) == found


def test_each_entry_of_the_history_is_a_step() -> None:
    read = parse_config(json.dumps({"history": [{}, 1, {"created_by": 7, "empty_layer": "yes"}]}).encode())
    assert read is not None
    assert [(each.created_by, each.empty) for each in read.history] == [
        ("", False),
        ("", False),
        ("7", False),
    ]


def test_steps_that_do_not_fit_the_layers_are_not_guessed() -> None:
    read = parse_config(config(2))
    assert read is not None
    assert [each and each.created_by for each in layer_steps(read.history, 2)] == ["RUN step 0", "RUN step 1"]
    assert layer_steps(read.history, 3) == [None, None, None]
    assert layer_steps([], 0) == []


async def test_a_comparison_shows_what_the_image_shows(site: Site) -> None:  # noqa: F811
    await image(site, ALPINE, "1", b"{}", b"layer")
    await image(site, ALPINE, "2", json.dumps(ALL).encode(), b"layer")
    (platform,) = (await site.operations.diff("alpine:1", "alpine:2")).platforms
    compared = {(each.kind, each.name): each.new for each in platform.values}
    shown = await site.operations.config("alpine:2")
    assert compared["config", "entrypoint"] == "/bin/app 'a b'"
    assert compared["env", "A"] == "1"
    assert compared["config", f"port {shown.ports[0]}"] == "yes"
    assert compared["label", "team"] == shown.labels["team"]
    assert compared["history", "1"] == shown.history[0].created_by
    assert [each.created_by for each in platform.layers] == ["ADD"]


async def test_a_configuration_that_is_too_large_is_not_compared(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await image(site, ALPINE, "1", config(1), b"layer")
    await image(site, ALPINE, "2", config(1, env=["A=1"]), b"layer")
    monkeypatch.setattr(image_config, "CONFIG_LIMIT", len(config(1)))
    (platform,) = (await site.operations.diff("alpine:1", "alpine:2")).platforms
    assert platform.values == []
    assert len(platform.unknown) == 1
    assert "the configuration" in platform.unknown[0]
