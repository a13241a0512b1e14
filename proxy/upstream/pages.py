"""The pages of a listing: distribution-spec, "Content Discovery"; links by RFC 8288."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from proxy.upstream.listing_memory import ListingMemory
from proxy.upstream.messages import UpstreamRequest
from proxy.upstream.requests import RequestSender
from storage.errors import ManifestUnknown, NameUnknown, OriginFailed, OriginTimeout, Unsupported

LISTING_LIMIT = 16 << 20  # bytes of one page
LISTING_TOTAL = 32 << 20  # bytes of all pages, which are in memory together
LISTING_SECONDS = 60.0  # for all pages: clients wait no longer
PAGES = 1000

# RFC 8288 §3.  Some registries leave out the brackets.  In such a target, a comma before a space is an end.
_TARGET = re.compile(r"[ \t,]*(?:<([^<>]*)>|([^\s<>;,]+(?:,[^\s<>;,]+)*))")
_PARAMETER = re.compile(
    r"[ \t]*;[ \t]*"
    r'(?:([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s",;]*)))?)?'
)
_END = re.compile(r"[ \t]*(?:,|$)")
_URI = re.compile(r"[!-~]*")  # RFC 3986 §2: a URI is ASCII without spaces


async def pages(sender: RequestSender, request: UpstreamRequest, memory: ListingMemory) -> AsyncIterator[Any]:
    """The pages as JSON values.  Raises an error rather than end before the last page."""
    with memory.share() as take:
        async for page in _pages(sender, request, take):
            yield page


async def _pages(
    sender: RequestSender, request: UpstreamRequest, take: Callable[[int], None]
) -> AsyncIterator[Any]:
    deadline = asyncio.get_running_loop().time() + LISTING_SECONDS
    name, path, size = sender.name, request.url.path, 0
    page: UpstreamRequest | None = request
    for number in range(PAGES):
        if page is None:
            return
        try:
            async with asyncio.timeout_at(deadline):
                response, content = await sender.document(page, LISTING_LIMIT, take)
        except TimeoutError:
            raise OriginTimeout(f"{name} took over {LISTING_SECONDS:.0f} s to list {path}") from None
        except (ManifestUnknown, NameUnknown, Unsupported) as error:
            if number == 0:
                raise
            raise OriginFailed(f"{name} does not know page {number + 1} of {path}") from error
        if (size := size + len(content)) > LISTING_TOTAL:
            raise OriginFailed(f"{name} lists more than {LISTING_TOTAL >> 20} MiB for {path}")
        try:
            yield msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # Some registries without a referrers API answer with an HTML page.
            error_class = ManifestUnknown if request.kind == "referrers" and number == 0 else OriginFailed
            raise error_class(f"{name} answered {path} without JSON") from None
        url = _next_url(sender, response)
        page = None if url is None else replace(request, url=url)
    raise OriginFailed(f"{name} lists more than {PAGES} pages of {path}")


def _next_url(sender: RequestSender, response: aiohttp.ClientResponse) -> URL | None:
    """The URL of the next page; None after the last.  Raises OriginFailed if it must not be requested."""
    header = ", ".join(response.headers.getall("Link", ()))
    try:
        target = next_target(header)
    except ValueError:
        if "next" not in header.lower():  # whatever it links to, it is no further page
            return None
        raise OriginFailed(f"{sender.name} sent a malformed Link header, {header[:200]!r}") from None
    if target is None:
        return None
    try:
        # The escapes of a URL are part of it, unless it holds what must be escaped.
        url = response.url.join(URL(target, encoded=_URI.fullmatch(target) is not None))
        if (url.scheme, response.url.scheme, url.raw_host) == ("http", "https", response.url.raw_host):
            # The registry does not know that a proxy terminates TLS before it.  Keep using TLS.
            url = url.with_scheme("https").with_port(response.url.explicit_port)
        origin = url.origin(), url.port  # origin() accepts a port that is out of range
    except ValueError:
        raise OriginFailed(
            f"{sender.name} continues a listing at {target[:200]!r}, which is no URL"
        ) from None
    # A redirected listing continues where the redirect led.
    if origin not in [(each.origin(), each.port) for each in (response.url, sender.home)]:
        raise OriginFailed(f"{sender.name} continues a listing at another host, {url.raw_host}")
    return url


def next_target(header: str) -> str | None:
    """The target of the first link to a next page, of the values of Link.  Raises ValueError."""
    header, position = header.strip(" \t,"), 0
    while position < len(header):
        if (link := _TARGET.match(header, position)) is None:
            raise ValueError("a link without a target")
        position = link.end()
        parameters: dict[str, str] = {}
        while found := _PARAMETER.match(header, position):
            position = found.end()
            value = found[3] or "" if found[2] is None else re.sub(r"\\(.)", r"\1", found[2])
            # RFC 8288 §3.3: of several relations, all but the first are ignored.
            parameters.setdefault((found[1] or "").lower(), value)
        if (end := _END.match(header, position)) is None:
            raise ValueError("a parameter is malformed")
        position = end.end()
        # RFC 8288 §3.2: with an anchor, it is another document that has this next page.
        if "next" in parameters.get("rel", "").lower().split() and not parameters.get("anchor"):
            return link[2] if link[1] is None else link[1]
    return None
