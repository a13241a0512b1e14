"""A browser for all tests of a process, and windows that are closed at the end of each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import PROGRAM, Chromium, Tab
from tests.clients.processes import require

HERE = Path(__file__).parent
Open = Callable[..., Awaitable[Tab]]


def pytest_itemcollected(item: pytest.Item) -> None:
    """All tests here have a real client, which is a browser."""
    if item.path.is_relative_to(HERE):
        item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    require(PROGRAM, root=False)
    browser = Chromium()
    browser.start()
    yield browser
    browser.stop()


@pytest.fixture
async def window(chromium: Chromium) -> AsyncIterator[Open]:
    """A window: `await window(url, scripts=False)`.  At its end, its console must have been silent."""
    tabs: list[Tab] = []

    async def start(url: object, **options: bool) -> Tab:
        tabs.append(await chromium.open(str(url), **options))
        return tabs[-1]

    yield start
    for each in tabs:
        await each.close()
