"""A registry across the network, as a Registry: its answers become our values and errors.

What upstreams get wrong is put right here or refused here: a missing digest or length, a Content-Type
with parameters or of no use, a compressed manifest though identity was asked, a 200 to a Range, content
that is not what its digest says.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import aiohttp
import msgspec
import structlog
from yarl import URL

from proxy.limits import Bandwidth
from proxy.telemetry import Metrics
from proxy.upstream.credentials import Credentials
from proxy.upstream.health import UNTOLD, Budgets, HostState, seconds_until
from proxy.upstream.tokens import Answer, Tokens
from proxy.upstream.transport import Connect, Transport
from storage.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
    Unavailable,
    Unsupported,
)
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    OCI_INDEX,
    OCI_MANIFEST,
    OCTETS,
    Descriptor,
    Digest,
    Manifest,
    Reference,
    Span,
    Tag,
    parse_manifest,
)
from storage.registry import Blob, Registry

log = structlog.get_logger()

MANIFEST_LIMIT = 4 << 20  # bytes: distribution-spec, "Pushing Manifests", and what clients take
LISTING_LIMIT = 16 << 20  # bytes of one page
PAGES = 1000
ACCEPT = ", ".join(
    (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, f"{DOCKER_SCHEMA1};q=0.5", "*/*;q=0.1")
)
# Types that say nothing: some upstreams serve manifests as these.
_VAGUE = frozenset(("", "application/json", "text/plain", "text/html", OCTETS))


@dataclass(frozen=True)
class Settings:
    """`url` ends before /v2; `token_realms` are hosts that may be asked for tokens besides its own.

    Blobs keep to `bandwidth`, which several upstreams may share.
    `reserve` says how much of a rate limit is kept for what is not known yet; nothing, if it says 0.
    """

    url: str
    connect: Connect = field(default_factory=Connect)
    token_realms: tuple[str, ...] = ()
    reserve: Callable[[int], float] = lambda limit: 0
    bandwidth: Bandwidth = field(default_factory=Bandwidth)


class Upstream(Registry):
    """Read-only.  Needs a running event loop.  Of `credentials` there is at least one."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        home = URL(settings.url)
        self.host = home.host_port_subcomponent or ""
        self._name = name
        self._url = settings.url.rstrip("/")
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._reserve = settings.reserve
        self._bandwidth = settings.bandwidth
        self._traffic = metrics.traffic(name)
        self._transport = Transport(
            name,
            settings.connect,
            home,
            changed=self._changed,
            retried=metrics.retries.labels(name).inc,
            clock=clock,
        )
        metrics.open.labels(name, self.host).set(0)
        self._health = self._transport.breaker(home)
        self._caller = False
        self._show(credentials)

    def _show(self, credentials: Sequence[Credentials]) -> None:
        self._budgets = Budgets(len(credentials), self._clock)
        self._tokens = [
            Tokens(
                self.host,
                each,
                self._fetch,
                allowed_realms=self._settings.token_realms,
                plain_http=self._settings.connect.plain_http,
                clock=self._clock,
                on_fetch=lambda result: self._metrics.tokens.labels(self._name, result).inc(),
            )
            for each in credentials
        ]

    def as_caller(self, credentials: Credentials) -> Upstream:
        """The same, by the same connections, with credentials that are not ours.  To be closed before it."""
        caller = copy(self)
        caller._caller = True
        caller._reserve = lambda limit: 0
        caller._show([credentials])
        return caller

    # Health

    def _changed(self, host: str, error: RegistryError | None) -> None:
        self._metrics.open.labels(self._name, host).set(error is not None)
        if error is not None:
            log.warning("upstream.opened", namespace=self._name, host=host, error=str(error))
        else:
            log.info("upstream.closed", namespace=self._name, host=host)

    @property
    def well(self) -> bool:
        """As far as is known, it answers."""
        return self._health.closed

    @property
    def due(self) -> bool:
        """It did not answer, and it is time to find out whether it does."""
        return self._health.due

    @property
    def spares(self) -> bool:
        """Its rate limit allows more than what is kept in reserve."""
        return self._budgets.spares(self._reserve)

    def state(self) -> list[HostState]:
        """Of the upstream itself first, then of where it has sent us."""
        return [
            each.state(self._url, host, self._budgets.state() if each is self._health else [])
            for host, each in self._transport.breakers()
        ]

    async def probe(self) -> None:
        """Find out; `well` tells."""
        with suppress(RegistryError):
            (await self._transport.send("GET", URL(f"{self._url}/v2/"), {})).release()

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        headers = {}
        if span is not None:
            headers["Range"] = f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"
        response = await self._ask("GET", repository, f"blobs/{digest}", "blob", headers)
        try:
            start, size = self._extent(response, span)
            if _encoding(response):
                raise OriginFailed(f"{self._name} encoded {digest} though identity was asked for")
            if size < 0:
                # Clients want a length, and progress needs one.
                size = (await self.resolve_blob(repository, digest)).size
            descriptor = Descriptor(OCTETS, digest, size)
            return _Download(self._transport, response, descriptor, start, self._took)
        except BaseException:
            response.close()
            raise

    async def _took(self, number: int) -> None:
        self._traffic.took(number)
        await self._bandwidth.take(number)

    def _extent(self, response: aiohttp.ClientResponse, span: Span | None) -> tuple[int, int]:
        """Where the body starts in the blob, and the blob's size, or -1."""
        if response.status != 206:
            return 0, _length(response)
        # RFC 9110 §14.4
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        positions, _, total = rest.partition("/")
        start = positions.partition("-")[0].strip()
        if unit != "bytes" or not start.isdigit() or span is None or int(start) != span.start:
            raise OriginFailed(f"{self._name} answered a range with another one")
        return span.start, int(total) if total.isdigit() else -1

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        path = f"blobs/{digest}"
        try:
            response = await self._ask("HEAD", repository, path, "blob", {})
        except Unsupported:  # no HEAD there: ask for the content, and leave it
            response = await self._ask("GET", repository, path, "blob", {})
        response.close()
        return Descriptor(OCTETS, digest, _length(response))

    # Manifests

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        headers = {"Accept": ACCEPT}
        async with await self._ask(
            "GET", repository, f"manifests/{reference}", "manifest", headers
        ) as response:
            content = await self._content(response, MANIFEST_LIMIT)
            media_type = _media_type(response)
            if media_type in _VAGUE:
                try:
                    media_type = parse_manifest(content).media_type
                except ManifestInvalid:
                    raise OriginFailed(
                        f"{self._name} answered {reference} of {repository} with no manifest"
                    ) from None
            said = _digest(response)
        if isinstance(reference, Digest):
            manifest = Manifest.of(media_type, content, reference.algorithm)
            if manifest.digest != reference:
                self._wrong(repository, reference, manifest.digest)
            return manifest
        manifest = Manifest.of(media_type, content, said.algorithm if said else "sha256")
        # Of a schema 1 manifest the digest leaves out its signatures.
        if said not in (None, manifest.digest) and media_type != DOCKER_SCHEMA1:
            self._wrong(repository, reference, manifest.digest)
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        """Of a Tag only who knows it asks that: below the reserve it is refused with TooManyRequests."""
        if isinstance(reference, Tag) and not self.spares:
            raise TooManyRequests(f"what {self._name} still grants us is kept for what is not known yet")
        headers = {"Accept": ACCEPT}
        path = f"manifests/{reference}"
        try:
            async with await self._ask("HEAD", repository, path, "manifest", headers) as response:
                digest, size, media_type = _digest(response), _length(response), _media_type(response)
            right = isinstance(reference, Tag) or digest == reference
            if digest is not None and right and size >= 0 and media_type not in _VAGUE:
                return Descriptor(media_type, digest, size)
        except Unsupported:
            pass
        # Some registries say too little on HEAD, or know none.
        return (await self.get_manifest(repository, reference)).descriptor

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        found: set[str] = set()
        async for page in self._pages(repository, "tags/list", "tags"):
            tags = page.get("tags") if isinstance(page, dict) else ""
            if not isinstance(tags, list | None):  # Distribution says null for none
                raise OriginFailed(f"{self._name} lists as tags of {repository} what is no list")
            found.update(tag for tag in tags or () if isinstance(tag, str) and tag > last)
        return sorted(found)[:limit]

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None = None
    ) -> list[Descriptor]:
        found = []
        try:
            async for page in self._pages(repository, f"referrers/{digest}", "referrers"):
                manifests = page.get("manifests") if isinstance(page, dict) else None
                if not isinstance(manifests, list):
                    raise ManifestUnknown("no index")
                found += [Descriptor.from_json(each) for each in manifests]
        except (ManifestUnknown, NameUnknown, ManifestInvalid):
            # Clients then look for the fallback tag; on NAME_UNKNOWN they would give up.
            raise ManifestUnknown(
                f"{self._name} lists no referrers of {digest}; see the tag {digest.replace(':', '-')}"
            ) from None
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    async def _pages(self, repository: str, path: str, kind: str) -> AsyncIterator[Any]:
        """The pages of a listing, as plain JSON values.  distribution-spec, "Content Discovery"."""
        url: URL | None = self._to(repository, path)
        for _ in range(PAGES):
            if url is None:
                return
            async with await self._ask("GET", repository, url, kind, {}) as response:
                content = await self._content(response, LISTING_LIMIT)
                link = response.links.get("next")
            try:
                yield msgspec.json.decode(content)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                # Some registries without a referrers API answer with a page for people.
                nonsense = ManifestUnknown if kind == "referrers" else OriginFailed
                raise nonsense(f"{self._name} answered {path} with no JSON") from None
            url = URL(str(link["url"])) if link else None
            if url is not None and url.origin() != URL(self._url).origin():
                raise OriginFailed(f"{self._name} lists on at another host, {url.host}")
        raise OriginFailed(f"{self._name} lists more than {PAGES} pages of {path}")

    # Asking

    def _to(self, repository: str, path: str) -> URL:
        return URL(f"{self._url}/v2/{repository}/{path}", encoded=True)

    async def _ask(
        self, method: str, repository: str, path: str | URL, kind: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        """A response with content, with whichever credentials.  Raises what its status says, translated."""
        url = self._to(repository, path) if isinstance(path, str) else path
        denied: OriginDenied | None = None
        for number in self._budgets.take_turn():
            try:
                return await self._ask_as(number, method, repository, url, kind, headers)
            except TooManyRequests as error:
                seconds = self._budgets[number].refused(error.retry_after)
                log.warning("upstream.limited", namespace=self._name, host=self.host, credential=number,
                            seconds=round(seconds))  # fmt: skip
            except OriginDenied as error:
                denied = error
        # Whoever is blocked might have been let in.
        if denied is not None and not self._budgets.blocked_for:
            raise denied
        seconds = math.ceil(self._budgets.blocked_for)
        raise TooManyRequests(f"{self._name} limits our requests", retry_after=seconds)

    async def _ask_as(
        self, number: int, method: str, repository: str, url: URL, kind: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        scope = f"repository:{repository}:pull"
        tokens = self._tokens[number]
        authorization = await tokens.authorization(scope)
        # One renewal of what was refused; learning first what is wanted does not count.
        tries = 1 if authorization else 2
        while True:
            given = {**headers, "Authorization": authorization} if authorization else headers
            response = await self._timed(method, url, given, kind)
            if response.status not in (401, 403) or not tries:
                break
            tries -= 1
            if response.url.origin() == url.origin():
                challenges = response.headers.getall("WWW-Authenticate", ())
                renewed = await self._renewed(tokens, response, scope, challenges, authorization)
                if renewed is None:
                    break
                authorization = renewed
            # Else a signed URL has lapsed: from the start there is a fresh one.
            response.release()
        home = response.url.origin() == url.origin()
        if home and self._budgets[number].read(response.headers) and not self._caller:
            self._tell(number)
        if response.status in (200, 206):
            return response
        error = self._refusal(response, repository, kind)
        if isinstance(error, TooManyRequests) and not home:
            # A CDN's limit has nothing to do with these credentials.
            error = Unavailable(str(error), retry_after=error.retry_after)
        response.release()
        raise error

    def _tell(self, number: int) -> None:
        labels = self._name, self.host, str(number)
        budget = self._budgets[number]
        if budget.remaining is not None:
            self._metrics.ratelimit_remaining.labels(*labels).set(budget.remaining)
        if budget.limit is not None:
            self._metrics.ratelimit_limit.labels(*labels).set(budget.limit)

    async def _renewed(
        self,
        tokens: Tokens,
        response: aiohttp.ClientResponse,
        scope: str,
        challenges: Any,
        used: str | None,
    ) -> str | None:
        try:
            return await tokens.renew(scope, challenges, used)
        except BaseException:
            response.release()
            raise

    async def _timed(
        self, method: str, url: URL, headers: dict[str, str], kind: str
    ) -> aiohttp.ClientResponse:
        begun, status = time.monotonic(), 0
        self._traffic.asked()
        try:
            response = await self._transport.follow(method, url, headers)
            status = response.status
            return response
        finally:
            seconds = time.monotonic() - begun
            self._metrics.upstream.labels(self._name, kind, str(status)).observe(seconds)
            log.debug(
                "upstream.asked", namespace=self._name, method=method, path=url.path, status=status,
                seconds=round(seconds, 4),
            )  # fmt: skip

    def _refusal(self, response: aiohttp.ClientResponse, repository: str, kind: str) -> RegistryError:
        """What an upstream's status means here: the one place where it is translated."""
        status = response.status
        said = f"{self._name} answered {status} for {repository}"
        if status in (401, 403):
            return OriginDenied(f"{said}: it refuses these credentials" if status == 403 else said)
        if status == 429:
            return TooManyRequests(
                f"{self._name} limits our requests", retry_after=seconds_until(response.headers, time.time)
            )
        if status == 416:
            return RangeInvalid(said)
        if status in (405, 501) and response.method == "HEAD":
            return Unsupported(said)
        if status in (404, 410) or (kind == "referrers" and 400 <= status < 500):
            unknown = {"blob": BlobUnknown, "tags": NameUnknown}.get(kind, ManifestUnknown)
            return unknown(said)
        return OriginFailed(said, retry_after=seconds_until(response.headers, time.time))

    async def _content(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        content = await self._transport.read(response, limit)
        self._traffic.took(len(content))
        encoding = _encoding(response)
        if not encoding:
            return content
        if encoding in ("gzip", "x-gzip", "deflate"):
            try:
                decoder = zlib.decompressobj(wbits=47 if "gzip" in encoding else zlib.MAX_WBITS)
                decoded = decoder.decompress(content, limit + 1)
            except zlib.error:
                raise OriginFailed(f"{self._name} sent a body that is not {encoding}") from None
            if len(decoded) <= limit and decoder.eof:
                return decoded
        raise OriginFailed(f"{self._name} sent a body in {encoding} though identity was asked for")

    def _wrong(self, repository: str, reference: Reference, found: Digest) -> NoReturn:
        log.error(
            "upstream.wrong_digest",
            namespace=self._name,
            repository=repository,
            reference=reference,
            found=found,
        )
        raise OriginFailed(f"{self._name} sent for {reference} of {repository} what is {found}")

    async def _fetch(
        self, method: str, url: URL, *, headers: Any, form: Any = None
    ) -> Answer:  # tokens.Fetch
        self._traffic.asked()
        response = await self._transport.send(method, url, headers, form)
        async with response:
            content = await self._content(response, MANIFEST_LIMIT)
            seconds = seconds_until(response.headers, time.time)
            if response.status == 429 and seconds is None:
                seconds = UNTOLD  # the window of the registry's limit says nothing of this one
            return Answer(response.status, content, seconds)

    async def close(self) -> None:
        for each in self._tokens:
            await each.close()
        if not self._caller:
            await self._transport.close()


class _Download(Blob):
    """A body under way; it can be read once."""

    def __init__(
        self,
        transport: Transport,
        response: aiohttp.ClientResponse,
        descriptor: Descriptor,
        start: int,
        took: Callable[[int], Awaitable[None]],
    ) -> None:
        self.descriptor = descriptor
        self._took = took
        self._transport = transport
        self._response = response
        self._position = start

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        if start < self._position:
            raise ValueError(f"the body is past byte {start}")
        try:
            async for chunk in self._response.content.iter_any():
                await self._took(len(chunk))
                # An upstream that ignores Range sends what we have once more.
                skipped = min(len(chunk), start - self._position)
                self._position += len(chunk)
                rest = len(chunk) if stop is None else len(chunk) - max(0, self._position - stop)
                if skipped < rest:
                    yield chunk[skipped:rest] if skipped or rest < len(chunk) else chunk
                    start = self._position
                if stop is not None and self._position >= stop:
                    return
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._transport.broken(self._response, error) from error

    async def close(self) -> None:
        # Not release(): that would read what is left of a large body.
        self._response.close()


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()


def _length(response: aiohttp.ClientResponse) -> int:
    """Of the content, in bytes; -1 where it is not told, or is that of its encoded form."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not _encoding(response) else -1


def _encoding(response: aiohttp.ClientResponse) -> str:
    """The content's coding; "" is the identity."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _digest(response: aiohttp.ClientResponse) -> Digest | None:
    text = response.headers.get("Docker-Content-Digest", "")
    try:
        return Digest.parse(text)
    except RegistryError:
        return None
