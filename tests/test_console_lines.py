"""The log as lines for people."""

from __future__ import annotations

import time
from typing import Any

import pytest
import structlog

from proxy.telemetry.console_lines import ConsoleLines
from tests.test_telemetry import REQUEST

DIGEST = "sha256:" + "ab" * 32
NOW = 1_700_000_000.0
CLOCK = time.strftime("%H:%M:%S", time.localtime(NOW))


def line(event: str = "request.served", colored: bool = False, **values: Any) -> str:
    found = {"event": event, "level": "info", **(REQUEST if event == "request.served" else {}), **values}
    text = ConsoleLines(colored, lambda: NOW)(None, "info", found)
    assert text.startswith(f"{CLOCK} ")
    return text.removeprefix(f"{CLOCK} ")


BLOB = {"kind": "blob", "reference": DIGEST}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "200 hit GET docker.io/library/nginx:1.27 10.0.0.7 1.5 KiB 12 ms"),
        (
            {**BLOB, "result": "miss", "bytes": 30 << 20, "seconds": 2.0},
            "200 miss GET blob docker.io/library/nginx@sha256:abababababab 10.0.0.7"
            " 30.0 MiB 2.0 s, 15.0 MiB/s",
        ),
        (
            {"status": 404, "result": "error", "detail": "MANIFEST_UNKNOWN", "reason": "it is not there"},
            "404 error GET docker.io/library/nginx:1.27 10.0.0.7 1.5 KiB 12 ms - it is not there",
        ),
        (
            {**BLOB, "status": 499, "result": "hit", "detail": "client left", "bytes": 0},
            "499 hit GET blob docker.io/library/nginx@sha256:abababababab 10.0.0.7 12 ms - client left",
        ),
        (
            {"method": "PUT", "result": "", "status": 201, "user": "ann", "bytes": 0, "received": 700},
            "201 PUT docker.io/library/nginx:1.27 10.0.0.7 ann 700 B 12 ms",
        ),
        (
            {
                "namespace": "-",
                "repository": "",
                "reference": "",
                "kind": "other",
                "status": 404,
                "result": "",
            },
            "404 GET other 10.0.0.7 1.5 KiB 12 ms",
        ),
    ],
)
def test_a_request_is_one_line(values: dict[str, Any], expected: str) -> None:
    assert line(**values) == expected


def test_a_fill_has_its_speed() -> None:
    values = {"namespace": "docker.io", "repository": "library/nginx", "digest": DIGEST}
    assert (
        line("fill.committed", **values, bytes=10 << 20, seconds=0.5)
        == "fill.committed docker.io/library/nginx@sha256:abababababab 10.0 MiB 500 ms, 20.0 MiB/s"
    )


def test_other_events_have_no_empty_keys() -> None:
    values = {
        "host": "a.example",
        "error": "no route",
        "zero": 0,
        "none": None,
        "text": "",
        "all": [],
        "some": (),
    }
    assert (
        line("upstream.opened", level="warning", **values)
        == "warning upstream.opened host=a.example error=no route zero=0"
    )


def test_an_exception_follows_its_event() -> None:
    found = line("request.failed", level="error", exception="Traceback\nValueError: two")
    assert found == "error request.failed\nTraceback\nValueError: two"


@pytest.mark.parametrize(
    ("values", "color"),
    [
        ({}, "32"),
        ({"status": 404}, "33"),
        ({"status": 502}, "31"),
    ],
)
def test_the_status_has_a_color(values: dict[str, Any], color: str) -> None:
    status = values.get("status", 200)
    assert line(colored=True, **values).startswith(f"\x1b[{color}m{status}\x1b[0m ")
    assert "\x1b" not in line(**values)


def test_what_steers_a_terminal_is_taken_out() -> None:
    for found in (
        line(reason="\x1b[2J\n200 hit", status=404, colored=False),
        line("a.b", key="\x1b[2J\nc"),
        line(user="\x9b31m"),
        line("a.b", exception="ValueError: \x1b[2J").replace("\n", ""),
    ):
        assert not any(not each.isprintable() for each in found)


@pytest.mark.parametrize("status", [200, 401])
def test_a_ping_is_not_logged(status: int) -> None:
    with pytest.raises(structlog.DropEvent):
        line(kind="base", status=status, reference="", repository="")
