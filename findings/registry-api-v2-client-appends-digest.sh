#!/usr/bin/env bash
# Expected: a client adds the parameter `digest` to the Location of an upload as its URL needs: by `?`, or by `&` where
#   there is a query. registry-api-v2-client does, for blobs of up to 5 MiB.
# Actual: for larger blobs, which it sends by PATCH, it appends `&digest=` to any Location. One without a query is right
#   by the distribution specification, but then the digest is in the path, and there is no parameter. The session looks
#   unknown: small images can be pushed, and large ones end with 404 after all bytes were sent.
# Versions: registry-api-v2-client 1.2.0, aiohttp 3.14.5 (PyPI).
# Why a registry cache must care: such clients and scripts were tried with Distribution alone, whose Location always has a
#   query. A registry should read `<upload>&digest=…` as it is meant, since no id of an upload needs `&`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check registry-api-v2-client==1.2.0 aiohttp==3.14.5
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import hashlib
import sys
from importlib.metadata import version

from aiohttp import ClientSession, web
from registry_api_v2_client.core.types import RegistryConfig
from registry_api_v2_client.operations import blobs

BLOB = b"a layer"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
LOCATIONS = {"without a query": "/v2/app/blobs/uploads/1", "with one": "/v2/app/blobs/uploads/1?_state=2"}
location = ""
asked: list[str] = []


async def answer(request: web.Request) -> web.Response:
    await request.read()
    if request.method != "PUT":
        return web.Response(status=202, headers={"Location": location})
    asked.append(request.path_qs)
    found = request.path == "/v2/app/blobs/uploads/1" and request.query.get("digest") == DIGEST
    return web.Response(status=201 if found else 404)


async def main() -> bool:
    global location
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
    host, port = runner.addresses[0]
    config = RegistryConfig(url=f"http://{host}:{port}")
    seen = {}
    async with ClientSession() as session:
        for upload in (blobs.upload_blob_monolithic, blobs.upload_blob_chunked):
            for what, location in LOCATIONS.items():
                try:
                    await upload(session, config, "app", BLOB, DIGEST)
                    seen[upload.__name__, what] = "ok"
                except Exception as error:
                    seen[upload.__name__, what] = str(error)
                print(f"  {upload.__name__}, Location {what}: PUT {asked[-1][:40]}…: {seen[upload.__name__, what]}")
    await site.stop()
    await runner.cleanup()
    failed = seen.pop(("upload_blob_chunked", "without a query"))
    return "404" in failed and set(seen.values()) == {"ok"}


print(f"registry-api-v2-client {version('registry-api-v2-client')}, aiohttp {version('aiohttp')}")
holds = asyncio.run(main())
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
