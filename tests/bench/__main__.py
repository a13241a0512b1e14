"""Entrepôt, Debian's docker-registry as a proxy, and nginx, at the same work in turn.

Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import click

from tests.bench import report
from tests.bench.clients import BenchError
from tests.bench.peers import Distribution, DockerRegistry, Entrepot, Former, OneWorker, Peer, Signed, Zot
from tests.bench.scenarios import Scenario, Target, all_scenarios, verify
from tests.bench.upstream import Upstream

NEEDED = ("docker-registry", "nginx", "wrk")  # commands, and Debian's packages of the same names
PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Entrepot, OneWorker, Signed, Former, DockerRegistry, Distribution, Zot)
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse_without_tools() -> None:
    # Debian keeps nginx in /usr/sbin, which is not on every user's path.
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"
    if sys.platform != "linux":
        raise click.ClickException("only Linux tells what processes cost, in /proc")
    if missing := " ".join(command for command in NEEDED if not shutil.which(command)):
        raise click.ClickException(f"not installed: {missing}; on Debian: apt-get install {missing}")


def environment() -> list[str]:
    def version(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"\d+\.\d+[\w.+~-]*", done.stdout + done.stderr)
        return found[0] if found else "?"

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    versions = {
        "docker-registry": version("docker-registry", "--version"),
        "nginx": version("nginx", "-v"),
        "wrk": version("wrk", "-v"),
        "Python": platform.python_version(),
    }
    return [
        f"- command: `{shlex.join(['python', '-m', 'tests.bench', *sys.argv[1:]])}`",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}; "
        f"load before the start {os.getloadavg()[0]:.1f}",
        f"- versions: {', '.join(f'{name} {text}' for name, text in versions.items())}",
    ]


def forget(directory: Path) -> None:
    """Take the blobs that the peers have stored so far out of the page cache.

    Writing was seen to become three times as costly once it ran out of pages that were in use a moment ago:
    a virtual machine's memory can be slow at first touch.  That would hit whoever comes late.
    """
    for path in directory.rglob("blobs/sha256/**/*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(
    scenario: Scenario, upstream: Upstream, directory: Path, names: list[str], rounds: int
) -> report.Results:
    """Fresh peers, a verified first time that is not counted, then the rounds: a new order each."""
    through = getattr(upstream, scenario.through)
    scheme = "https" if scenario.through == "tls_port" else "http"
    peers: dict[str, Peer] = {}
    try:
        for name in names:
            if name in PEERS:
                peers[name] = PEERS[name](directory / name, f"{scheme}://127.0.0.1:{through}")
        targets = {name: Target(peer.port, peer.process, upstream) for name, peer in peers.items()}
        if scenario.nginx and "nginx" in names:
            direct = upstream.direct_port if scenario.through == "port" and not scenario.cold else through
            targets["nginx"] = Target(direct, upstream.process, upstream)
        return _rounds(scenario, targets, upstream, rounds)
    finally:
        for peer in peers.values():
            peer.stop()


def _rounds(
    scenario: Scenario, targets: dict[str, Target], upstream: Upstream, rounds: int
) -> report.Results:
    content = scenario.content(upstream)
    for target in targets.values():
        verify(target, content)
    order: list[str] = list(targets)
    results: report.Results = {name: [] for name in targets}
    for number in range(rounds):
        if scenario.cold:
            content.remove()
            content = scenario.content(upstream)
        for name in order:
            os.sync()  # nobody pays for what another has written
            upstream.take_log()
            if scenario.cold:
                forget(upstream.directory)
            results[name].append(scenario.sample(targets[name], content))
            say(f"  {number + 1}/{rounds} {name}: {', '.join(f'{each:.4g}' for each in results[name][-1])}")
        order.append(order.pop(0))
    if scenario.size:
        content.remove()
    return results


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([each.key for each in all_scenarios(quick=True)]),
    help="Repeatable.",
)
@click.option("--peers", default="entrepot,docker-registry,nginx", show_default=True)
@click.option("--rounds", type=click.IntRange(1), help="At most that many rounds of each scenario.")
@click.option("--quick", is_flag=True, help="A minute: one round, short samples, small blobs.")
def main(only: tuple[str, ...], peers: str, rounds: int | None, quick: bool) -> None:
    """The same work for Entrepôt, docker-registry (as a proxy) and nginx, in turn; prints a table."""
    refuse_without_tools()
    names = peers.split(",")
    if unknown := set(names) - {*PEERS, "nginx"}:
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--peers")
    lines = [*environment(), "", *report.header(names)]
    chosen = [each for each in all_scenarios(quick) if not only or each.key in only]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="entrepot-bench-") as directory,
            closing(Upstream(Path(directory))) as upstream,
        ):
            for scenario in chosen:
                titles = [f"{measure.title} [{measure.unit}]" for measure in scenario.measures]
                say(f"{scenario.key}: {', '.join(titles)}")
                count = min(scenario.rounds, rounds or (1 if quick else scenario.rounds))
                with tempfile.TemporaryDirectory(dir=directory) as place:
                    lines += report.rows(scenario, run(scenario, upstream, Path(place), names, count), names)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    finally:
        print("\n".join(lines))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench")
