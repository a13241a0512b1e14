"""The URL grammar of the distribution API, both ways: parse(build(route)) == route.

    /v2/                                     BASE        end-1
    /v2/<name>/blobs/<digest>                BLOB        end-2, end-10
    /v2/<name>/manifests/<reference>         MANIFEST    end-3, end-7, end-9
    /v2/<name>/blobs/uploads/                UPLOADS     end-4, end-11
    /v2/<name>/blobs/uploads/<upload>        UPLOAD      end-5, end-6, end-13, end-14
    /v2/<name>/blobs/uploads/<upload>&digest=<digest>    UPLOAD, as clients of Distribution may write end-6
    /v2/<name>/tags/list                     TAGS        end-8
    /v2/<name>/referrers/<digest>            REFERRERS   end-12
    /v2/_catalog                             CATALOG     Docker's, not in the specification
    /v2/@<date>/<name>/...                   each end that pulls, with tags as they were then
    /token, /<prefix>/token                  TOKEN       Docker's token authentication specification

The end numbers are those of distribution-spec, "Endpoints".  Rules:

- Every path may begin with one more component, /<prefix>/v2/...: the address of a mirror with a path.
- The last keyword decides, since a repository may have components named v2, manifests, blobs, tags.
- The first component of a name may be a host with a port, or an IPv6 address in brackets, which the name of a
  repository may not contain.
- The namespace of a name is not decided here but in Namespaces, which knows them all; so
  /v2/docker.io/v2/library/alpine/... is the name docker.io/v2/library/alpine.  Only a ping, which has no
  name, is recognized by its form: /v2/<prefix>/ and /v2/<prefix>/v2/ are pings of a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from urllib.parse import quote, unquote, urlencode

from proxy.access.authentication import TOKEN_PATH
from proxy.config.hosts import IPV6, NAME
from storage.errors import NameInvalid, PaginationNumberInvalid, PathUnknown
from storage.oci import NAME_LIMIT, Digest, Reference, parse_name, parse_reference

_HOST = rf"{NAME.pattern}|{IPV6.pattern}"
_UNDER_PREFIX = re.compile(rf"/({_HOST})(/v2(?:/.*)?)")
_TOKEN = re.compile(rf"(?:/({_HOST}))?{TOKEN_PATH}")
_PREFIX_PING = re.compile(rf"/v2/({_HOST})/(?:v2/?)?")
_PORT = re.compile(r"([^/:]+):[0-9]{1,5}(/.+)")
_UNDER_IPV6 = re.compile(rf"{IPV6.pattern}/(.+)")
_AS_OF = re.compile(r"/v2/@([0-9TZ:-]{10,20})(/.+)")
_PULLED = ("manifest", "blob", "tags", "referrers")
_UPLOAD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._~=-]{0,254}")
REMEMBERED = 512  # characters of a path that is worth the memory


class Endpoint(Enum):
    """The endpoints of the API, in the table above."""

    BASE = "base"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    CATALOG = "catalog"
    UPLOADS = "uploads"
    UPLOAD = "upload"
    TOKEN = "token"


@dataclass(frozen=True, slots=True)
class Route:
    """A parsed path.

    name: as the client wrote it, with or without a namespace
    reference: a Digest for BLOB and REFERRERS, a Digest or a Tag for MANIFEST, a Digest or None for UPLOAD,
        otherwise None
    upload: the id of the session of an UPLOAD
    as_of: the date, as the client wrote it, of which tags are wanted
    """

    kind: Endpoint
    name: str = ""
    reference: Reference | None = None
    prefix: str = ""
    upload: str = ""
    as_of: str = ""


def parse(path: str) -> Route:
    """Parse the path of a request target, as parse_path() does, and remember the route."""
    return _remembered(path) if len(path) <= REMEMBERED else parse_path(path)


def parse_path(path: str) -> Route:
    """Parse the path of a request target, still percent-encoded and without the query.

    Escapes are decoded once: clients do write sha256%3A…, and %2F for a slash.

    Raises PathUnknown, NameInvalid, DigestInvalid and TagInvalid, and nothing else for any text.  The latter
    three mean 400, except that the conformance suite of the specification pulls the tag
    `.INVALID_MANIFEST_NAME` and wants a 404: for GET and HEAD, a TagInvalid becomes ManifestUnknown.
    """
    if "%" in path:
        path = _decode(path)
    if path.startswith("/v2/@"):
        return _dated(path)
    prefix = ""
    if not path.startswith("/v2/"):
        if path == "/v2":
            return Route(Endpoint.BASE)
        if token := _TOKEN.fullmatch(path):
            return Route(Endpoint.TOKEN, prefix=token[1] or "")
        found = _UNDER_PREFIX.fullmatch(path)
        if not found:
            raise _unknown(path)
        prefix, path = found.groups()
    head, _, last = path.rpartition("/")
    base, _, keyword = head.rpartition("/")
    name = base[4:]  # without "/v2/"
    if name:
        if keyword == "manifests":
            return Route(Endpoint.MANIFEST, _name(name), parse_reference(last), prefix)
        if keyword == "blobs" and last != "uploads":
            return Route(Endpoint.BLOB, _name(name), Digest.parse(last), prefix)
        if keyword == "tags" and last == "list":
            return Route(Endpoint.TAGS, _name(name), None, prefix)
        if keyword == "referrers":
            return Route(Endpoint.REFERRERS, _name(name), Digest.parse(last), prefix)
        if keyword == "blobs":  # "uploads" without its slash
            return Route(Endpoint.UPLOADS, _name(name), None, prefix)
        if keyword == "uploads" and name.endswith("/blobs"):
            return _upload(path, name.removesuffix("/blobs"), prefix, last)
    return _without_name(path, prefix)


_remembered = lru_cache(maxsize=4096)(parse_path)


def build(route: Route) -> str:
    """Return the path of a route, in which only the brackets of an IPv6 address need quoting."""
    path = _build(route)
    if route.as_of:
        path = f"/v2/@{route.as_of}{path.removeprefix('/v2')}"
    return quote(path, safe="/:") if "[" in path else path


def _build(route: Route) -> str:
    if route.kind is Endpoint.TOKEN:
        return f"/{route.prefix}{TOKEN_PATH}" if route.prefix else TOKEN_PATH
    start = f"/{route.prefix}/v2/" if route.prefix else "/v2/"
    match route.kind:
        case Endpoint.BASE:
            return start
        case Endpoint.CATALOG:
            return f"{start}_catalog"
        case Endpoint.MANIFEST:
            return f"{start}{route.name}/manifests/{route.reference}"
        case Endpoint.BLOB:
            return f"{start}{route.name}/blobs/{route.reference}"
        case Endpoint.REFERRERS:
            return f"{start}{route.name}/referrers/{route.reference}"
        case Endpoint.TAGS:
            return f"{start}{route.name}/tags/list"
        case _:  # UPLOADS, UPLOAD
            appended = f"&digest={route.reference}" if route.reference else ""
            return f"{start}{route.name}/blobs/uploads/{route.upload}{appended}"


def build_location(route: Route, ns: str | None) -> str:
    """Return the path of a route, with the parameter `ns` if the client gave one."""
    return build(route) if ns is None else f"{build(route)}?{urlencode({'ns': ns})}"


def parse_limit(text: str | None) -> int | None:
    """Parse the parameter `n`, the number of entries that the client wants; None without one.

    0 is allowed and means no entries: distribution-spec, "Content Discovery".  Raises
    PaginationNumberInvalid.
    """
    if text is None:
        return None
    # int() accepts "+1", "1_0" and the digits of other scripts, and refuses more than 4300 digits.
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise PaginationNumberInvalid(f"n={text[:50]!r} must be an integer of 0 or more")
    return int(text)


def build_next(route: Route, query: Mapping[str, object]) -> str:
    """Return a `Link` header to the next page: RFC 8288; distribution-spec, "Content Discovery".

    The link is relative, so that it is right behind any proxy.  `query` contains `n` and `last`, and the
    other parameters of the request (ns, artifactType).
    """
    return f'<{build(route)}?{urlencode(query)}>; rel="next"'


def _decode(path: str) -> str:
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise _unknown(path) from None


def _name(text: str) -> str:
    """Check the name of a repository, which may follow a host with a port.

    Its namespace decides which grammar it needs.
    """
    if len(text) > NAME_LIMIT:
        raise NameInvalid(f"{text[:100]!r}… is longer than the {NAME_LIMIT} characters a name may have")
    if text.startswith("[") and (under := _UNDER_IPV6.fullmatch(text)):
        parse_name(under[1], "any")
        return text
    found = _PORT.fullmatch(text) if ":" in text else None
    parse_name(found[1] + found[2] if found else text, "any")
    return text


def _dated(path: str) -> Route:
    found = _AS_OF.fullmatch(path)
    if found is None or found[2].startswith("/@"):
        raise _unknown(path)
    route = parse_path(f"/v2{found[2]}")
    if route.kind.value not in _PULLED:
        raise _unknown(path)
    return replace(route, as_of=found[1])


def _upload(path: str, name: str, prefix: str, upload: str) -> Route:
    name = _name(name)
    if not upload:
        return Route(Endpoint.UPLOADS, name, None, prefix)
    # Small clients know Distribution's Location, which has a query, and append "&digest=" to any.
    upload, appended, digest = upload.partition("&digest=")
    if not _UPLOAD.fullmatch(upload):
        raise _unknown(path)
    return Route(Endpoint.UPLOAD, name, Digest.parse(digest) if appended else None, prefix, upload)


def _without_name(path: str, prefix: str) -> Route:
    if path in ("/v2/", "/v2"):
        return Route(Endpoint.BASE, prefix=prefix)
    if path == "/v2/_catalog":
        return Route(Endpoint.CATALOG, prefix=prefix)
    found = None if prefix else _PREFIX_PING.fullmatch(path)
    if not found:
        raise _unknown(path)
    return Route(Endpoint.BASE, prefix=found[1])


def _unknown(path: str) -> PathUnknown:
    return PathUnknown(f"{path[:100]!r} is not an endpoint of the distribution API: they begin with /v2/")
