"""A web.Application with its router against a bare web.Server with our grammar, and each on uvloop.

    python -m tests.bench.router [--rounds N]

All answer one small manifest; nothing is read, stored or logged.  wrk asks them in turn.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from statistics import median

import click
from aiohttp import web

from proxy.web.routes import parse
from tests.bench.peers import free_port

PATH = "/v2/library/alpine/manifests/latest"
BODY = b"{}" * 400
HEADERS = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
KINDS = ("router", "bare", "router on uvloop", "bare on uvloop")


async def serve(kind: str, port: int) -> None:
    async def routed(request: web.Request) -> web.Response:
        assert request.match_info["reference"] == "latest"
        return web.Response(body=BODY, headers=HEADERS)

    async def bare(request: web.BaseRequest) -> web.Response:
        assert parse(request.rel_url.raw_path).reference == "latest"
        return web.Response(body=BODY, headers=HEADERS)

    if kind.startswith("router"):
        app = web.Application()
        for what in ("blobs/{digest}", "tags/list", "referrers/{digest}", "manifests/{reference}"):
            app.router.add_get("/v2/{name:.+}/" + what, routed)
        runner: web.BaseRunner = web.AppRunner(app, access_log=None)
    else:
        runner = web.ServerRunner(web.Server(bare, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def measure(kind: str) -> float:
    """Requests a second."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.router", "--serve", kind, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        load = ["wrk", "-t1", "-c16", "-d3s", f"http://127.0.0.1:{port}{PATH}"]
        told = subprocess.run(load, capture_output=True, text=True, check=True).stdout
        server.terminate()
    assert "Non-2xx" not in told, told
    found = re.search(r"Requests/sec:\s+([\d.]+)", told)
    assert found, told
    return float(found[1])


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--serve", "serving", type=(str, int), hidden=True)
def main(rounds: int, serving: tuple[str, int] | None) -> None:
    """Prints medians, and the ratio to the router."""
    if serving is not None:
        if serving[0].endswith("uvloop"):
            import uvloop

            uvloop.run(serve(*serving))
        else:
            asyncio.run(serve(*serving))
        return
    results: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            results[kind].append(measure(kind))
    for kind, rates in results.items():
        ratio = median(ours / theirs for ours, theirs in zip(rates, results["router"], strict=True))
        print(f"{kind:18} {median(rates):9,.0f} requests/s  {ratio:.2f}x")


if __name__ == "__main__":
    main()
