"""Why connections fail, in words: each mistake at each place, by real handshakes."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import LogCapture
from yarl import URL

from proxy.cli import target
from proxy.cli.main import main
from proxy.config.image_names import ImageName
from proxy.config.upstream import UpstreamConfig
from proxy.config.values import Secret
from proxy.config.webhooks import WebhookConfig
from proxy.connections.failures import explain, file_fault, reason
from proxy.connections.trust import client_context
from proxy.doctor import client, upstreams
from proxy.doctor.checks import Check
from proxy.extensions.extension import Extensions
from proxy.setup.site import Site
from proxy.telemetry.metrics import Metrics
from proxy.upstream.connect import Connect
from proxy.upstream.transport import Transport
from proxy.webhooks.delivery import Dispatcher
from proxy.webhooks.event import Event
from proxy.webhooks.queue import Queue
from storage.disk.records import SQLiteRecords
from storage.errors import RegistryError
from tests.clients.processes import require
from tests.conftest import Serve
from tests.events import Ear
from tests.mistaken import MISTAKES, NOWHERE, Mistake, Servers

# What no user can read: the text of OpenSSL, of Python, and of aiohttp.
FOREIGN = re.compile(
    r"_ssl\.c|\[Errno|\[SSL|Connect call failed|Cannot connect|certificate verify failed|Traceback"
    r"|\b[A-Z][a-zA-Z]+(?:Error|Exception|Disconnected)\b|<class |ssl:(?:default|True)"
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    return Servers(tmp_path_factory.mktemp("servers"))


@pytest.fixture(autouse=True)
def _resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name server is asked."""
    resolve = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **keys: Any) -> Any:
        if host == NOWHERE:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1" if host == "localhost" else host, *args, **keys)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


def connect(mistake: Mistake, servers: Servers) -> Connect:
    trust = servers.trust
    return Connect(
        ca_file=trust.ca if mistake.trusting else None,
        client_certificate=trust.strange["certificate"] if mistake.strange else None,
        client_key=trust.strange["key"] if mistake.strange else None,
        connect_timeout=0.2,
        header_timeout=0.3,
    )


async def by_transport(mistake: Mistake, servers: Servers, url: str) -> str:
    transport = Transport("up", connect(mistake, servers), URL(url))
    try:
        with pytest.raises(RegistryError) as raised:
            await transport.send("GET", URL(f"{url}/v2/"), {})
    finally:
        await transport.close()
    assert raised.value.public == str(raised.value)  # the client gets the same message
    assert re.match("up (cannot be reached: |did not answer in time$|: )", str(raised.value))
    return str(raised.value)


async def by_webhook(mistake: Mistake, servers: Servers, url: str) -> str:
    ca_file = servers.trust.ca if mistake.trusting else None
    webhook = WebhookConfig(name="a", url=Secret(f"{url}/?token=hunter2"), ca_file=ca_file, timeout=0.3)
    with TemporaryDirectory() as directory:
        queue = Queue(SQLiteRecords(Path(directory) / "records"))
        queue.put(
            [(Event(id="1", at=time.time(), action="push", kind="manifest", repository="a/b"), ("a",))], 9
        )
        ear = Ear()
        dispatcher = Dispatcher([webhook], queue, 5000, Metrics(), wait=lambda seconds: asyncio.sleep(3600))
        running = asyncio.create_task(dispatcher.run())
        try:
            told = str((await ear.heard("webhook.failing"))["error"])
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            queue.close()
    assert "hunter2" not in told
    return told


async def by_doctor(mistake: Mistake, servers: Servers, url: str) -> str:
    keys = connect(mistake, servers)
    checks, _ = await upstreams.check(
        "docker.io",
        UpstreamConfig(
            url=(url,),
            ca_file=keys.ca_file,
            client_certificate=keys.client_certificate,
            client_key=keys.client_key,
            connect_timeout=keys.connect_timeout,
            header_timeout=keys.header_timeout,
        ),
        Extensions({}),
    )
    return failures(checks)


async def by_doctor_of_clients(mistake: Mistake, servers: Servers, url: str) -> str:
    site = Site(URL(url), ("docker.io",), ca=servers.trust.ca.read_text() if mistake.trusting else None)
    options = client.ClientOptions(ImageName("docker.io", "library/alpine", "3"))
    return failures(await client.examine(site, servers.trust.ca.parent, options))


def failures(checks: list[Check]) -> str:
    (found,) = [each for each in checks if each.state == "failed"]
    return f"{found.message}; {found.advice}"


async def by_command(mistake: Mistake, servers: Servers, url: str) -> str:
    file = servers.trust.ca.parent / "entrepot.yml"
    file.write_text("{}")
    words = ["stats", "--server", url, "--config", str(file)]
    words += ["--ca-file", str(servers.trust.ca)] if mistake.trusting and mistake.scheme == "https" else []
    result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert result.exit_code == 1
    return result.stderr.rstrip("\n")


PLACES: dict[str, Callable[[Mistake, Servers, str], Awaitable[str]]] = {
    "upstream": by_transport,
    "webhook": by_webhook,
    "doctor": by_doctor,
    "doctor of clients": by_doctor_of_clients,
    "command": by_command,
}
# Only an upstream is shown a certificate of ours; to a command, an answer may come at any time.
CASES = [
    (name, place)
    for name, mistake in MISTAKES.items()
    for place in PLACES
    if not (mistake.strange and place not in ("upstream", "doctor"))
    and (name, place) != ("mute by http", "command")
]


@pytest.mark.parametrize(("name", "place"), CASES)
async def test_each_mistake_is_told_in_words(
    servers: Servers, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "CONNECT", 0.2)
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    mistake = MISTAKES[name]
    with mistake.server(servers) as url:
        told = await PLACES[place](mistake, servers, url)
    print(told)
    assert re.search(mistake.cause, told), told
    assert re.search(mistake.advice, told), told
    assert not FOREIGN.search(told), told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["self-signed", "unknown authority"])
@pytest.mark.clients
async def test_the_line_of_openssl_fetches_what_ca_file_needs(
    servers: Servers, name: str, tmp_path: Path
) -> None:
    require("openssl", root=False)
    mistake = MISTAKES[name]
    with mistake.server(servers) as url:
        line = (await by_transport(mistake, servers, url)).partition("ca_file: ")[2]
        shell = await asyncio.create_subprocess_shell(line, cwd=tmp_path, stderr=asyncio.subprocess.DEVNULL)
        assert await shell.wait() == 0
        transport = Transport("up", Connect(ca_file=tmp_path / "ca.pem"), URL(url))
        try:
            async with asyncio.timeout(20):
                response = await transport.send("GET", URL(f"{url}/v2/"), {})
            assert response.status == 200
            response.release()
        finally:
            await transport.close()


async def test_the_log_the_client_and_why_say_the_same(
    serve: Serve, servers: Servers, events: LogCapture
) -> None:
    mistake = MISTAKES["wrong name"]
    with mistake.server(servers) as url:
        site = await serve(url, options={"ca_file": str(servers.trust.ca)})
        status, _, body = await site.get("/v2/library/alpine/manifests/3")
        assert site.app.admin_url is not None
        async with site.session.get(f"{site.app.admin_url}/api/v1/why?ref=alpine:3") as response:
            why = await response.text()
    told = json.loads(body)["errors"][0]["message"]
    assert status == 502
    assert told.startswith("docker.io cannot be reached: its certificate is for one.example, ")
    (served,) = [each for each in events.entries if each["event"] == "request.served"]
    assert served["reason"] == told
    assert told.partition("; ")[0] in why


# What is wrong with files

HOLDS_NONE = "it has no certificate, or no key, in PEM format"


@pytest.mark.parametrize("content", ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n", None])
def test_a_file_without_certificates(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(OSError) as raised:
        client_context(file)
    assert file_fault(raised.value) == ("No such file or directory" if content is None else HOLDS_NONE)


# Errors that no server of these tests causes


def test_several_addresses_fail_each_for_its_own_reason() -> None:
    text = "Multiple exceptions: [Errno 113] Connect call failed ('10.0.0.1', 5), [Errno 101] Connect"
    assert reason(OSError(text)) == "No route to host, Network is unreachable"


@pytest.mark.parametrize("error", [KeyError(), ValueError(), OSError(), RuntimeError("a KeyError in f()")])
def test_an_error_without_words_for_users(error: Exception) -> None:
    assert reason(error) == "an unexpected fault"


def test_the_name_server_that_does_not_answer() -> None:
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert str(explain(error, URL("https://a.example"))) == (
        "the name a.example cannot be resolved: no name server answers; check /etc/resolv.conf"
    )
