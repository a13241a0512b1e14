"""Random writes to private registries at once, while database and bucket fail: what is lost, wrong or left.

In rounds: in each, one to six operations run at once, on a registry whose content is in files or in a bucket,
on two servers over one bucket and one database, or on a registry that is moved between these meanwhile.
Uploads in pieces, of which several requests go on with one; mounts, images, deletions, pulls, collections
with and without rules, and the removal of what was abandoned.  Images have referrers, tags that are
immutable, and conditions.  A transaction or an object may fail, or succeed and look as if it had failed.
After each round all is read and compared with what may be there, and up to two days pass.  At the end nothing
may be left but what is in use.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import click
import structlog

from tests.bench.bundle_rounds import BUNDLES, MOVING_BUNDLES, BundleRounds, MovingBundleRounds
from tests.bench.clients import BenchError
from tests.bench.moving_rounds import MOVING, MovingRounds
from tests.bench.rounds import Rounds
from tests.postgres import PostgresServer

MADE: dict[str, type[Rounds]] = {
    **dict.fromkeys(("files", "bucket", "two servers", "PostgreSQL"), Rounds),
    **dict.fromkeys(MOVING, MovingRounds),
    **dict.fromkeys(BUNDLES, BundleRounds),
    **dict.fromkeys(MOVING_BUNDLES, MovingBundleRounds),
}


@contextmanager
def postgres() -> Iterator[Callable[[], str]]:
    """A server, and what makes the URL of an empty database."""
    server = PostgresServer()
    try:
        server.start()
        yield server.database
        server.stop()
    finally:
        server.remove()


async def sample(kind: str, seed: int, rounds: int, database: str = "") -> Rounds:
    with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place:
        run = MADE[kind](kind, Path(place), Random(seed), database)
        for _ in range(rounds):
            await run.round()
        await run.end()
    return run


@click.command()
@click.option("--rounds", default=150, show_default=True, help="Of each seed.")
@click.option("--seeds", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
@click.option("--only", help="Part of the name of a kind.")
def main(rounds: int, seeds: int, seed: int, only: str | None) -> None:
    """Write at random and compare; prints a table."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # failures are what is meant
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.writes', *sys.argv[1:]])}`")
    print(f"- {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(
        "| content | operations | failures | collected blobs | wrong or left | CPU s |\n"
        "|---|--:|--:|--:|--:|--:|"
    )
    wrong = 0
    for kind in MADE:
        if only is not None and only not in kind:
            continue
        begun, runs = time.process_time(), []
        with postgres() if "PostgreSQL" in kind else nullcontext(lambda: "") as database:
            for number in range(seed, seed + seeds):
                runs.append(asyncio.run(sample(kind, number, rounds, database())))
                for each in runs[-1].expected.wrong:
                    print(f"  seed {number}: {each}", file=sys.stderr)
        collected = sum(each.done.pop("collected blobs") for each in runs)
        failures, found = (
            sum(each.failures.number for each in runs),
            sum(len(each.expected.wrong) for each in runs),
        )
        print(sum((each.done for each in runs), Counter[str]()), file=sys.stderr)
        operations, seconds = sum(each.done.total() for each in runs), time.process_time() - begun
        print(
            f"| {kind} | {operations:,} | {failures:,} | {collected:,} | {found} | {seconds:.0f} |",
            flush=True,
        )
        wrong += found
    if wrong:
        raise BenchError(f"{wrong} times something was lost, wrong or left")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.writes")
