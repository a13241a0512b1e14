"""How quantities are read, and written for people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.quantities import (
    Reserve,
    format_duration,
    format_past,
    format_share,
    format_size,
    format_time,
    parse_duration,
    plural,
)
from tests.configuring import (
    at,
    fault,
    namespace,
    read,
)

PARTS = {"w": 604800_000, "d": 86400_000, "h": 3600_000, "m": 60_000, "s": 1000, "ms": 1}


@given(st.fixed_dictionaries({}, optional={unit: st.integers(0, 10**6) for unit in PARTS}))
def test_durations_round_trip(numbers: dict[str, int]) -> None:
    text = "".join(f"{numbers[unit]}{unit}" for unit in PARTS if unit in numbers)
    milliseconds = sum(number * PARTS[unit] for unit, number in numbers.items())
    if text:
        assert parse_duration(text) == pytest.approx(milliseconds / 1000, rel=1e-12)
    else:
        with pytest.raises(ValueError, match="unit"):
            parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        "10",
        "1.5",
        "-1s",
        "1m1h",
        "1s1s",
        "10 x",
        "10  m",
        "' 1s'",
        "'1s '",
        "' '",
        "1h 2",
        "'10'",
        "true",
        "false",
        "1y",
        "s",
        "[]",
    ],
)
def test_duration_refused(text: str) -> None:
    line = fault(f"drain: {text}")
    assert line.startswith("drain: ")
    assert "ms, s, m, h, d, w" in line


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10 min", 600),
        ("10min", 600),
        ("10 m", 600),
        ("1 h 30 min", 5400),
        ("1 hour 1 second", 3601),
        ("2 days", 172800),
        ("1 week", 604800),
        ("90 sec", 90),
        ("5 ms", 0.005),
    ],
)
def test_units_may_be_words(text: str, seconds: float) -> None:
    assert read(f"drain: {text}").drain == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500G", 500 * 1000**3),
        ("500 GB", 500 * 1000**3),
        ("500Gi", 500 << 30),
        ("500 GiB", 500 << 30),
        ("500gb", 500 * 1000**3),
        ("7 B", 7),
        ("64k", 64000),
    ],
)
def test_sizes_may_leave_out_the_byte(text: str, size: int) -> None:
    assert read(f"disk: {{cache_limit: {text}}}").disk.cache_limit == size


@pytest.mark.parametrize("text", ["500", "500i", "500 iB", "5  G", "G", "1.5G", "500GG", "5 Gbit"])
def test_sizes_refused(text: str) -> None:
    assert fault(f"disk: {{cache_limit: {text}}}").startswith("disk.cache_limit: expected a size")


def test_zero_is_a_duration_but_no_timeout() -> None:
    assert read("drain: 0").drain == 0
    assert read("drain: 0s").drain == 0
    assert fault(at("header_timeout: 0")) == "namespaces.x.upstream.header_timeout: must be more than 0"


UNITLESS, DURATIONS, SIZES, PERCENT = ["0", "'0'"], ["0s", "'0 min'", "0h0m"], ["0B", "'0 GiB'", "0k"], ["0%"]
STRANGE = ["-0s", "0.5", "'00'", "' 0'", "''", "true"]
NEEDED = "must be more than 0"


@pytest.mark.parametrize(
    ("key", "taken", "refused", "says"),
    [
        ("drain: @", UNITLESS + DURATIONS, SIZES + PERCENT + STRANGE, "expected a duration"),
        (namespace("fresh_for: @"), UNITLESS + DURATIONS, SIZES + PERCENT + STRANGE, "expected a duration"),
        (at("connect_timeout: @"), [], UNITLESS + DURATIONS, NEEDED),
        ("disk: {collect_grace: @}", [], UNITLESS + DURATIONS, "must be 1h or more"),
        ("disk: {keep_for: @}", [], UNITLESS + DURATIONS, f"{NEEDED}, or never"),
        ("disk: {collect_every: @}", [], UNITLESS + DURATIONS, f"{NEEDED}, or off"),
        ("disk: {cache_limit: @}", [], UNITLESS + SIZES, NEEDED),
        ("disk: {scrub: @}", [], UNITLESS + SIZES, f"{NEEDED}, or off"),
        ("limits: {hit_memory: @}", [], UNITLESS + SIZES, f"{NEEDED}, or off"),
        ("disk: {min_free: @}", UNITLESS + SIZES + PERCENT, DURATIONS + STRANGE, "expected a size"),
        ("disk: {evict_to: @}", [], UNITLESS + PERCENT + SIZES, "expected a percentage from 1%"),
        (at("reserve: @"), UNITLESS + PERCENT, SIZES + STRANGE[:2], "expected a number of requests"),
    ],
)
def test_zeros(key: str, taken: list[str], refused: list[str], says: str) -> None:
    """Of every kind of quantity: quoted and not, with a unit and without."""
    none = [read(key.replace("@", each)) for each in taken]
    assert none[1:] == none[:-1]
    for each in refused:
        assert says in fault(key.replace("@", each))


@pytest.mark.parametrize(
    ("text", "reserve"),
    [
        ("10%", Reserve(percent=10)),
        ("0%", Reserve()),
        ("100%", Reserve(percent=100)),
        ("0", Reserve()),
        ("25", Reserve(requests=25)),
        ("'25'", Reserve(requests=25)),
    ],
)
def test_reserve(text: str, reserve: Reserve) -> None:
    assert read(at(f"reserve: {text}")).namespaces["x"].upstream.reserve == reserve


def test_what_a_reserve_keeps_of_a_limit() -> None:
    assert Reserve(percent=10).of(200) == 20
    assert Reserve(requests=7).of(200) == 7
    assert Reserve().of(200) == 0


@pytest.mark.parametrize("text", ["-1", "101%", "true", "1.5", "ten", "[1]", "'10 %'", "'1٤%'"])
def test_reserve_refused(text: str) -> None:
    line = fault(at(f"reserve: {text}"))
    assert line.startswith("namespaces.x.upstream.reserve: expected a number of requests, or a percentage")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_288_490_189, "1.2 GiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 1024**5, "3072.0 TiB"),
        (None, "?"),
        (-1, "?"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (1000 - 3 * 3600, "3 h ago"),
        (1000 - 59, "59 s ago"),
        (1000 - 60, "1 min ago"),
        (1000.4, "now"),
        (1000 + 600, "in 10 min"),
        (1000 + 86400 * 800, "in 2 y"),
        (math.inf, "forever"),
        (None, "never"),
    ],
)
def test_moments(time: float | None, text: str) -> None:
    assert format_time(time, 1000.0) == text


@pytest.mark.parametrize(
    ("time", "text"), [(1000 - 59, "59 s ago"), (1059, "now"), (1000 + 86400, "now"), (None, "never")]
)
def test_what_has_happened_is_never_to_come(time: float | None, text: str) -> None:
    assert format_past(time, 1000.0) == text


def test_other_formats() -> None:
    assert format_duration(0.2) == "0 s"
    assert format_share(None) == "-"
    assert format_share(0.957) == "95.7%"
    assert plural(1, "blob") == "1 blob"
    assert plural(2, "repository", "repositories") == "2 repositories"
