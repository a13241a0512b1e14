"""What forms of the web page mean, what a result says, and what goes on without the page."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.admin.models import FillRow
from proxy.admin.operations import OPERATIONS
from proxy.admin.reports import Deleted, Evicted, KeptRow
from proxy.namespaces.references import FieldInvalid
from proxy.processes.rows import SpanRow
from proxy.ui.acts import ACTS, Act
from proxy.ui.facts import MOST, facts
from proxy.ui.jobs import REMEMBERED, Jobs
from proxy.ui.screens.transfers import FINEST, bars
from storage.errors import Unavailable
from tests.conftest import Clock


@pytest.mark.parametrize("act", ACTS.values(), ids=list(ACTS))
def test_the_fields_of_an_act_are_parameters_of_its_operation(act: Act) -> None:
    operation = OPERATIONS[act.operation]
    parameters = inspect.signature(operation.parameters).parameters
    assert {each.name for each in act.fields} <= parameters.keys()
    required = {name for name, each in parameters.items() if each.default is each.empty}
    assert required == {each.name for each in act.fields if each.required}
    assert act.preview == ("dry_run" in parameters)
    assert operation.method != "GET"


@pytest.mark.parametrize(
    ("name", "form", "arguments"),
    [
        ("warm", {"reference": " alpine:3 ", "platforms": "linux/amd64, linux/arm64"}, {
            "reference": "alpine:3", "platforms": ["linux/amd64", "linux/arm64"], "referrers": False}),
        ("warm", {"reference": "alpine", "referrers": "yes"}, {"reference": "alpine", "referrers": True}),
        ("purge", {"pattern": "a/*", "force": "yes"}, {"pattern": "a/*", "force": True}),
        ("evict", {"to": ""}, {}),
        ("evict", {"to": "1GiB"}, {"to": 1 << 30}),
        ("drill", {"seconds": "1h30m"}, {"seconds": 5400.0}),
        ("delete", {"pattern": "local/x:*", "keep": "0"}, {"pattern": "local/x:*", "keep": 0}),
        ("end-drill", {}, {}),
    ],
)  # fmt: skip
def test_what_a_form_gives(name: str, form: dict[str, str], arguments: dict[str, Any]) -> None:
    assert ACTS[name].arguments(form) == arguments


@pytest.mark.parametrize(
    ("name", "form", "fault"),
    [
        ("warm", {"reference": " "}, "Reference: is required"),
        ("warm", {"reference": "a", "dry_run": "yes"}, "dry_run: there is no such field"),
        ("evict", {"to": "-1"}, "Until this much is left: "),
        ("drill", {"seconds": "soon"}, "For: "),
        ("delete", {"pattern": "a", "keep": "²"}, "Except the last: expected a number"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, form: dict[str, str], fault: str) -> None:
    with pytest.raises(FieldInvalid, match=f"^{fault}"):
        ACTS[name].arguments(form)


def test_a_form_that_is_not_whole_may_lack_fields() -> None:
    assert ACTS["override"].arguments({"reference": "a", "reason": ""}, whole=False) == {"reference": "a"}


def test_a_result_in_words() -> None:
    evicted = Evicted(
        blobs=1234, bytes=1 << 20, manifests=0, tags=0, links=2, seconds=90.0, short=0, dry_run=True
    )
    assert facts(evicted) == [
        ("blobs", ["1,234"]),
        ("bytes", ["1.0 MiB"]),
        ("manifests", ["0"]),
        ("tags", ["0"]),
        ("links", ["2"]),
        ("seconds", ["1 min"]),
        ("short", ["0 B"]),
    ]
    kept = [KeptRow(reference="local/a:1", reason="it is immutable")]
    names = [f"local/a:{number}" for number in range(MOST + 5)]
    deleted = Deleted(references=names, kept=kept, manifests=1, blobs=0, bytes=0, dry_run=False)
    found = dict(facts(deleted))
    assert found["references"] == [*names[:MOST], "and 5 more"]
    assert found["kept"] == ["reference local/a:1, reason it is immutable"]
    assert facts([deleted, deleted]) == [*facts(deleted)] * 2
    assert facts(None) == []


async def test_what_goes_on_and_how_it_ended(clock: Clock) -> None:
    jobs, gate = Jobs(clock), asyncio.Event()

    async def work(error: Exception | None = None) -> None:
        await gate.wait()
        if error is not None:
            raise error

    good, bad = jobs.begin("Warm", "a", work()), jobs.begin("Warm", "b", work(Unavailable("it is down")))
    assert [(each.subject, each.running, each.error) for each in jobs] == [
        ("b", True, None),
        ("a", True, None),
    ]
    gate.set()
    await asyncio.wait({good.task, bad.task})
    assert [(each.subject, each.running, each.error) for each in jobs] == [
        ("b", False, "it is down"),
        ("a", False, None),
    ]
    changed = asyncio.ensure_future(jobs.change())
    await asyncio.sleep(0)
    jobs.begin("Warm", "c", asyncio.sleep(3600))
    await changed
    await jobs.close()
    assert [each.error for each in jobs] == ["the server was stopped", "it is down", None]


@pytest.mark.errors("ui.failed")
async def test_a_fault_of_ours_is_logged(clock: Clock, events: LogCapture) -> None:
    jobs = Jobs(clock)

    async def work() -> None:
        raise ValueError("a secret")

    job = jobs.begin("Warm", "a", work())
    await asyncio.wait({job.task})
    await asyncio.sleep(0)
    assert job.error == "internal error: see the log"
    assert [each["event"] for each in events.entries] == ["ui.failed"]


async def test_only_the_last_ones_are_remembered(clock: Clock) -> None:
    jobs = Jobs(clock)
    for number in range(REMEMBERED + 3):
        job = jobs.begin("Warm", str(number), asyncio.sleep(0))
        await job.task
    assert [each.subject for each in jobs] == [str(each) for each in range(REMEMBERED + 2, 2, -1)]
    await jobs.close()


def test_a_bar_has_no_more_parts_than_can_be_seen() -> None:
    def row(*extents: tuple[int, int], coming: tuple[tuple[int, int], ...] = (), size: int = 2000) -> FillRow:
        return FillRow(
            digest="sha256:a", namespace="x", repository="x/y", bytes=0, size=size, started=0.0, followers=1,
            pid=1, own=True, extents=[SpanRow(start=a, stop=b) for a, b in extents],
            coming=[SpanRow(start=a, stop=b) for a, b in coming], repeated=0, speed=0.0, eta=None,
        )  # fmt: skip

    assert bars([row((0, 100), (1000, 2000), coming=((100, 1000),))]) == [
        [("coming", 50.0, 450.0), ("there", 0.0, 50.0), ("there", 500.0, 500.0)]
    ]
    assert bars([row((4, 6), (8, 10), (12, 40))]) == [[("there", 2.0, 18.0)]]
    assert bars([row((0, 1))]) == [[("there", 0.0, FINEST)]]
    many = [(number * 2, number * 2 + 1) for number in range(1000)]
    assert bars([row(*many)]) == [[("there", 0.0, 999.5)]]
    assert bars([row((0, 0), size=-1), row(size=0)]) == [[], []]
