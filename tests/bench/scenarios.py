"""What is measured: each scenario is one piece of work, done by every peer in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.bench.clients import BenchError, Stream, download, get, requests_per_second
from tests.bench.peers import Process
from tests.bench.upstream import MIB, REPOSITORY, TAG, Content, Image, Upstream

GIB = 1 << 30
SLOW_READER = 15 * MIB  # bytes per second
VERIFYING_CLIENTS = 4


@dataclass(frozen=True)
class Aim:
    """At least `value` times as good as `peer`; without one, at most `value` itself."""

    value: float
    peer: str = ""

    def __str__(self) -> str:
        return f"{self.value:g}× {self.peer}" if self.peer else f"≤ {self.value:g}"


@dataclass(frozen=True)
class Measure:
    title: str
    unit: str
    more_is_better: bool = False
    aim: Aim | None = None


@dataclass(frozen=True)
class Target:
    """A peer, or nginx itself, ready for one sample."""

    port: int
    process: Process
    upstream: Upstream


Sample = Callable[[Target, Content], list[float]]


@dataclass(frozen=True)
class Scenario:
    """`sample` does the work once: one figure for each of `measures`.

    A cold one gets a new blob for every round, or a new image; `size` None stands for an image that all
    have.  `through` is the port of the upstream that the caches ask.
    """

    key: str
    measures: tuple[Measure, ...]
    sample: Sample
    size: int | None
    cold: bool = False
    through: Literal["port", "tls_port", "slow_port", "link_port"] = "port"
    rounds: int = 5
    nginx: bool = True
    image: bool = False

    def content(self, upstream: Upstream) -> Content:
        if self.size is None:
            return upstream.image
        return upstream.add_image(self.size) if self.image else upstream.add_blob(self.size)


def manifest(reference: str, seconds: int) -> Sample:
    def sample(target: Target, content: Content) -> list[float]:
        path = f"/v2/{REPOSITORY}/manifests/{reference or content.digest}"
        before = target.process.cpu_seconds()
        rate = requests_per_second(target.port, path, seconds)
        return [rate, (target.process.cpu_seconds() - before) / (rate * seconds) * 1e6]

    return sample


def small(seconds: int) -> Sample:
    """A blob that is as large as many configs and signatures are."""

    def sample(target: Target, content: Content) -> list[float]:
        before = target.process.cpu_seconds()
        rate = requests_per_second(target.port, content.path, seconds)
        return [rate, (target.process.cpu_seconds() - before) / (rate * seconds) * 1e6]

    return sample


def warm(clients: int, repeat: int) -> Sample:
    def sample(target: Target, content: Content) -> list[float]:
        streams = [Stream(target.port, content.path, content.size, repeat) for _ in range(clients)]
        before = target.process.cpu_seconds()
        seconds = download(streams)
        sent = content.size * repeat * clients / GIB
        return [sent / seconds, (target.process.cpu_seconds() - before) / sent]

    return sample


def cold(clients: int) -> Sample:
    def sample(target: Target, content: Content) -> list[float]:
        streams = [Stream(target.port, content.path, content.size) for _ in range(clients)]
        before = target.process.cpu_seconds()
        seconds = download(streams)
        sent = target.upstream.take_log().bytes  # waits for what goes on behind the clients' backs
        return [seconds, sent / content.size, target.process.cpu_seconds() - before]

    return sample


def first_byte(target: Target, content: Content) -> list[float]:
    stream = Stream(target.port, content.path, content.size)
    download([stream])
    traffic = target.upstream.take_log()
    return [(stream.first_byte or 0.0) * 1000, traffic.gets + traffic.others]


def image(clients: int) -> Sample:
    """Each client asks for the manifest by its tag and, once all have it, for all layers at once."""

    def sample(target: Target, content: Content) -> list[float]:
        assert isinstance(content, Image)
        before = target.process.cpu_seconds()
        manifests = [Stream(target.port, content.path, content.size) for _ in range(clients)]
        layers = [Stream(target.port, each.path, each.size) for each in content.layers * clients]
        first = download(manifests)
        seconds = first + download(layers)
        first += min(each.first_byte or 0.0 for each in layers)
        sent = target.upstream.take_log().bytes
        size = sum(layer.size for layer in content.layers)
        return [seconds, first, sent / size, target.process.cpu_seconds() - before]

    return sample


def followers(target: Target, content: Content) -> list[float]:
    """Every other client reads slowly."""
    rates = [SLOW_READER if number % 2 else None for number in range(100)]
    download([Stream(target.port, content.path, content.size, rate=rate) for rate in rates])
    sent = target.upstream.take_log().bytes
    return [target.process.peak_bytes() / MIB, sent / content.size]


def verify(target: Target, content: Content) -> None:
    """Several clients at once, one of which hashes what it gets.  Raises BenchError."""
    if isinstance(content, Image):
        for path in (content.path, f"/v2/{REPOSITORY}/manifests/{content.digest}"):
            status, body = get(target.port, path)
            if status != 200 or body != content.file.read_bytes():
                raise BenchError(f"{path} on port {target.port}: {status} {body[:500]!r}")
    for blob in content.layers if isinstance(content, Image) else (content,):
        streams = [Stream(target.port, blob.path, blob.size) for _ in range(VERIFYING_CLIENTS)]
        streams[0].digest = blob.digest
        download(streams)
    target.upstream.take_log()


def all_scenarios(quick: bool) -> list[Scenario]:
    """Quick ones have short samples and small blobs: to see that all works, not to quote."""
    seconds, full = (1, 60 * MIB) if quick else (4, 300 * MIB)
    cpu = Measure("server CPU", "µs/request")
    cpu_gib = Measure("server CPU", "s/GiB")
    cpu_all = Measure("server CPU", "s")
    bytes_once = Measure("upstream bytes", "× blob", aim=Aim(1.0))

    def rate(title: str, factor: float) -> Measure:
        return Measure(title, "requests/s", True, Aim(factor, "docker-registry"))

    def speed(title: str) -> Measure:
        return Measure(title, "GiB/s", True, Aim(1, "nginx"))

    def time(title: str, factor: float) -> Measure:
        return Measure(title, "s", aim=Aim(factor, "docker-registry"))

    first = Measure("cold blob through the link, first byte", "ms", aim=Aim(1, "docker-registry"))
    memory = Measure("peak memory of a process, 100 followers of a cold blob", "MiB", aim=Aim(150))
    single = time("cold blob through the link, 1 client", 1)
    linked = time("cold blob through the link, 20 clients", 5)
    one, twenty = time("cold blob, 1 client", 1), time("cold blob, 20 clients", 5)
    tls = time("cold blob, 1 client, upstream by TLS", 1)
    cold_cost = (bytes_once, cpu_all)
    first_cost = (Measure("upstream requests", ""),)
    pull = Measure("cold image through the link, 1 client", "s")
    pulls = Measure("cold image through the link, 20 clients", "s")
    image_start = Measure("until the first byte of a layer", "s")
    image_cost = (image_start, Measure("upstream bytes", "× image"), cpu_all)

    return [
        Scenario("digest", (rate("manifest by digest", 3), cpu), manifest("", seconds), None),
        Scenario("tag", (rate("manifest by tag", 30), cpu), manifest(TAG, seconds), None),
        Scenario("small", (rate("blob of 16 KiB", 10), cpu), small(seconds), 16 << 10),
        Scenario("warm1", (speed("warm blob, 1 client"), cpu_gib), warm(1, 12), full),
        Scenario("warm8", (speed("warm blob, 8 clients"), cpu_gib), warm(8, 2), full),
        Scenario("cold1", (one, *cold_cost), cold(1), full, True),
        Scenario("cold1-tls", (tls, *cold_cost), cold(1), full, True, "tls_port", nginx=False),
        Scenario("cold20", (twenty, *cold_cost), cold(20), full, True),
        # Without nginx: it is known how long transfers take on a link of known speed.
        Scenario("link1", (single, *cold_cost), cold(1), full // 3, True, "link_port", 3, False),
        Scenario("link20", (linked, *cold_cost), cold(20), full // 3, True, "link_port", 2, False),
        Scenario("first-byte", (first, *first_cost), first_byte, 10 * MIB, True, "link_port"),
        Scenario("image1", (pull, *image_cost), image(1), full // 3, True, "link_port", 3, False, True),
        Scenario("image20", (pulls, *image_cost), image(20), full // 3, True, "link_port", 2, False, True),
        # Memory is a peak, so a second round in the same process would tell nothing new.
        Scenario(
            "memory", (memory, bytes_once), followers, full, True, through="slow_port", rounds=1, nginx=False
        ),
    ]
