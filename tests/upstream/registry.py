"""The registry itself: vendor switches, scripts, and the answers of the distribution specification."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from multidict import CIMultiDict

from tests.upstream.connections import Connections
from tests.upstream.content import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Content, Repository, referrer
from tests.upstream.door import Basic, Bearer, Door
from tests.upstream.faults import ExpireToken, Fault
from tests.upstream.messages import DIGEST, Answer, Request, failure
from tests.upstream.pushing import Takes, Uploads

What = str | Callable[[Request], bool]


@dataclass
class _Script:
    method: str
    what: What
    faults: tuple[Fault, ...]
    left: int


class Upstream(Content):
    """A registry at `url`, and at `cdn_url` the store that `cdn=True` redirects blobs to.

    Switches, each a habit of some vendor: `digest_header` (off: no Docker-Content-Digest, no ETag),
    `ignores_n` (in lists of names), `page_size` (names at most per page, asked or not),
    `referrers_page_size`, `cdn`, `referrers_api`, `content_length` (off: blobs are chunked), `ranges`,
    `open_ranges` (off: ranges without an end are refused, as by go-containerregistry's registry), `auth`,
    `ratelimit` (limit, window in seconds, remaining; only GET of a manifest is counted, as at Docker Hub),
    `takes` (what it does with pushes; None: it is read-only).  All of them are attributes and may be
    changed at any time.
    """

    def __init__(
        self,
        *,
        digest_header: bool = True,
        ignores_n: bool = False,
        page_size: int | None = None,
        referrers_page_size: int | None = None,
        cdn: bool = False,
        referrers_api: bool = True,
        content_length: bool = True,
        ranges: bool = True,
        open_ranges: bool = True,
        auth: Basic | Bearer | None = None,
        ratelimit: tuple[int, int, int] | None = None,
        takes: Takes | None = None,
    ) -> None:
        super().__init__()
        self.digest_header = digest_header
        self.ignores_n = ignores_n
        self.page_size = page_size
        self.referrers_page_size = referrers_page_size
        self.cdn = cdn
        self.referrers_api = referrers_api
        self.content_length = content_length
        self.ranges = ranges
        self.open_ranges = open_ranges
        self.auth = auth
        self.ratelimit = ratelimit
        self.takes = takes
        self.requests: list[Request] = []
        self._connections = Connections(self._decide)
        self._door = Door(self)
        self._uploads = Uploads(self, self)
        self._scripts: list[_Script] = []
        self._signed: dict[str, bool] = {}  # targets at the CDN, and whether they still hold

    async def __aenter__(self) -> Upstream:
        await self.start()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self.stop()
        if self._connections.errors and error is None:
            raise ExceptionGroup("the fake upstream itself failed", self._connections.errors)

    async def start(self) -> None:
        """Listens; after `stop` on the same ports as before."""
        await self._connections.start()

    async def stop(self) -> None:
        """Refuses connections from now on and drops those that are open, held at a gate or not."""
        await self._connections.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._connections.ports[0]}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self._connections.ports[1]}"

    @property
    def bytes_sent(self) -> int:
        """Of blobs' bodies, whole or in part, as handed to the kernel."""
        return self._connections.bytes_sent

    @property
    def log(self) -> list[str]:
        """The requests, one line each: see Request.__str__."""
        return [str(request) for request in self.requests]

    @property
    def uploads(self) -> list[bytes]:
        """What the uploads hold that have neither been closed nor cancelled."""
        return self._uploads.open

    def clear(self) -> None:
        """Forgets the requests so far, and the bytes sent for them."""
        self.requests.clear()
        self._connections.bytes_sent = 0

    def next(self, method: str, what: What, *faults: Fault, times: int = 1) -> None:
        """The next `times` requests with this method for `what` meet these faults, all of them at once.

        `what` is a tag or digest, a kind of request, a path, or a function that says so.  Scripts are tried
        in the order they were given.  With `cdn`, a blob's digest means the request that is answered with its
        bytes; to meet the redirect, say "blob".
        """
        if not faults:
            raise ValueError("a script without a fault")
        if any(isinstance(each, ExpireToken) for each in faults) and not isinstance(self.auth, Bearer):
            raise ValueError("ExpireToken, but there are no tokens: auth is not Bearer")
        self._scripts.append(_Script(method, what, faults, times))

    @property
    def unmet(self) -> list[tuple[str, What, int]]:
        """Method, what and times of the faults that nothing met so far."""
        return [(script.method, script.what, script.left) for script in self._scripts]

    def expire_tokens(self) -> None:
        """Every token issued so far is invalid."""
        self._door.expire_tokens()

    def lapse_signatures(self) -> None:
        """Every redirect to the CDN issued so far is answered 403."""
        self._signed = dict.fromkeys(self._signed, False)

    def _faults(self, request: Request) -> tuple[Fault, ...]:
        for script in self._scripts:
            if script.method == request.method and self._meets(script.what, request):
                script.left -= 1
                self._scripts = [each for each in self._scripts if each.left > 0]
                return script.faults
        return ()

    def _meets(self, what: What, request: Request) -> bool:
        if not isinstance(what, str):
            return what(request)
        if what in (request.kind, request.path):
            return True
        named = request.kind in ("manifest", "cdn") or (request.kind == "blob" and not self.cdn)
        return named and what == request.reference

    def _decide(self, request: Request) -> Answer:
        self.requests.append(request)
        answer = self._door.refusal(request)
        if answer is None:
            faults = self._faults(request)
            if any(isinstance(fault, ExpireToken) for fault in faults):
                self.expire_tokens()
                answer = self._door.challenge(request, "invalid_token")
            else:
                answer = self._respond(request)
            for fault in faults:
                if not isinstance(fault, ExpireToken):
                    answer = fault.strike(answer, request)
        if request.kind not in ("token", "cdn"):
            answer.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        return answer

    def _respond(self, request: Request) -> Answer:
        if self.takes is not None and (request.kind == "upload" or request.method not in ("GET", "HEAD")):
            return self._uploads.respond(request, self.takes)
        if request.method not in ("GET", "HEAD"):
            return failure(405, "UNSUPPORTED", f"{request.method}: this registry is read-only")
        if request.kind == "base":
            return Answer(200, CIMultiDict({"Content-Type": "application/json"}), b"{}")
        if request.kind == "token":
            return self._door.issue(request)
        if request.kind == "cdn":
            return self._stored(request)
        if request.kind == "catalog":
            return self._page("repositories", self.repositories, request, {})
        if request.repository not in self.repositories:
            return failure(404, "NAME_UNKNOWN", f"no repository at {request.path}")
        holder = self.repositories[request.repository]
        if request.kind == "tags":
            return self._page("tags", holder.tags, request, {"name": request.repository})
        reference = request.reference or ""
        if (":" in reference or request.kind != "manifest") and not DIGEST.fullmatch(reference):
            return failure(400, "DIGEST_INVALID", reference)
        if request.kind == "referrers":
            return self._referrers(holder, request)
        return self._manifest(holder, request) if request.kind == "manifest" else self._blob(holder, request)

    def _manifest(self, holder: Repository, request: Request) -> Answer:
        """distribution-spec, "Pulling manifests"."""
        reference = request.reference or ""
        found = holder.manifests.get(holder.tags.get(reference, reference))
        if found is None:
            return failure(404, "MANIFEST_UNKNOWN", reference)
        # As lenient registries do: Accept rules out only the types that old clients do not know.
        accepted = {
            each.partition(";")[0].strip()
            for line in request.headers.getall("Accept", [])
            for each in line.split(",")
        }
        if (
            found.media_type in (OCI_MANIFEST, OCI_INDEX, DOCKER_LIST)
            and accepted
            and not accepted & {found.media_type, "*/*", "application/*"}
        ):
            return failure(404, "MANIFEST_UNKNOWN", f"Accept does not name {found.media_type}")
        limits = self._spend(request)
        if limits is None:
            return failure(429, "TOOMANYREQUESTS", "pull rate limit reached")
        answer = self._content(request, found.digest, found.media_type, found.content)
        answer.headers.update(limits)
        return answer

    def _spend(self, request: Request) -> dict[str, str] | None:
        """The headers of the rate limit, None when nothing of it remains."""
        if self.ratelimit is None:
            return {}
        limit, window, remaining = self.ratelimit
        remaining -= request.method == "GET"
        if remaining < 0:
            return None
        self.ratelimit = limit, window, remaining
        return {"RateLimit-Limit": f"{limit};w={window}", "RateLimit-Remaining": f"{remaining};w={window}"}

    def _content(self, request: Request, digest: str, media_type: str, content: bytes) -> Answer:
        answer = Answer(200, CIMultiDict({"Content-Type": media_type}), content)
        if self.digest_header:
            answer.headers["Docker-Content-Digest"] = digest
            answer.headers["ETag"] = f'"{digest}"'
            if request.headers.get("If-None-Match") in ("*", f'"{digest}"'):
                return replace(answer, status=304, content=b"")
        return answer

    def _blob(self, holder: Repository, request: Request) -> Answer:
        """distribution-spec, "Pulling blobs"."""
        digest = request.reference or ""
        content = holder.blobs.get(digest)
        if content is None:
            return failure(404, "BLOB_UNKNOWN", digest)
        if self.cdn:
            return Answer(307, CIMultiDict({"Location": self.cdn_url + self._sign(digest)}))
        return self._body(request, self._content(request, digest, "application/octet-stream", content))

    def _body(self, request: Request, answer: Answer) -> Answer:
        """A blob's bytes, or those that Range names.  RFC 9110 §14; several ranges get the whole."""
        answer = replace(answer, counted=True, chunked=not self.content_length)
        if not self.ranges or answer.status != 200:
            return answer
        answer.headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
        validator = request.headers.get("If-Range")
        outdated = validator is not None and validator != answer.headers.get("ETag")
        if request.method != "GET" or not asked or outdated:  # §14.2: Range is defined for GET only
            return answer
        first, last = asked.groups()
        total = len(answer.content)
        if not (first or last) or (first and last and int(last) < int(first)):
            return answer
        start = int(first) if first else max(total - int(last), 0)
        stop = min(int(last) + 1, total) if first and last else total
        if start >= total or not (last or self.open_ranges):
            return failure(416, "RANGE_INVALID", request.range or "", **{"Content-Range": f"bytes */{total}"})
        answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        return replace(answer, status=206, content=answer.content[start:stop], offset=start)

    def _sign(self, digest: str) -> str:
        """A target at the CDN, whose escapes change when somebody decodes and encodes them again."""
        algorithm, _, encoded = digest.partition(":")
        signature = hashlib.sha256(f"{len(self._signed)} {digest}".encode()).hexdigest()
        query = f"Credential=KEY%2F20260101%2fauto%2Fs3&Note=a%20b%3Dc%2Bd%7Ee+f&Signature={signature}"
        target = f"/stored/{algorithm}/{encoded}/data?{query}"
        self._signed[target] = True
        return target

    def _stored(self, request: Request) -> Answer:
        """The CDN: not a registry, and deaf to whom it was not told of."""
        if "Authorization" in request.headers:
            return _markup(400, "InvalidArgument")
        if request.target not in self._signed:
            return _markup(403, "SignatureDoesNotMatch")
        if not self._signed[request.target]:
            return _markup(403, "AccessDenied")
        for holder in self.repositories.values():
            if (content := holder.blobs.get(request.reference or "")) is not None:
                validator = hashlib.sha256(content).hexdigest()[:32]
                headers = CIMultiDict({"Content-Type": "application/octet-stream", "ETag": f'"{validator}"'})
                return self._body(request, Answer(200, headers, content))
        return _markup(404, "NoSuchKey")

    def _page(self, member: str, among: Mapping[str, Any], request: Request, body: dict[str, Any]) -> Answer:
        """distribution-spec, "Listing Tags": `n`, `last` and Link.  Names are in the order of their bytes."""
        wanted = request.query.get("n", "")
        if wanted and not wanted.isdecimal():
            return failure(400, "PAGINATION_NUMBER_INVALID", wanted)
        limits = [] if self.ignores_n or not wanted else [int(wanted)]
        limits += [] if self.page_size is None else [self.page_size]
        names = sorted(name for name in among if name > request.query.get("last", ""))
        shown = names[: min(limits)] if limits else names
        headers = CIMultiDict({"Content-Type": "application/json"})
        if shown and len(shown) < len(names):
            query = urlencode({"n": wanted or self.page_size, "last": shown[-1]})
            headers["Link"] = f'<{request.path}?{query}>; rel="next"'
        return Answer(200, headers, json.dumps({**body, member: shown}).encode())

    def _referrers(self, holder: Repository, request: Request) -> Answer:
        """distribution-spec, "Listing Referrers"."""
        if not self.referrers_api:
            return Answer(404, CIMultiDict({"Content-Type": "text/plain"}), b"404 page not found\n")
        headers = CIMultiDict({"Content-Type": OCI_INDEX})
        found = [each for each in map(referrer, holder.manifests.values()) if each[0] == request.reference]
        query = request.query
        if "artifactType" in query:
            headers["OCI-Filters-Applied"] = "artifactType"
            found = [each for each in found if each[1].get("artifactType") == query["artifactType"]]
        start = int(query.get("from", "0"))
        stop = start + self.referrers_page_size if self.referrers_page_size else len(found)
        if stop < len(found):
            query["from"] = str(stop)
            headers["Link"] = f'<{request.path}?{urlencode(query)}>; rel="next"'
        named = [descriptor for _, descriptor in found[start:stop]]
        body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": named}
        return Answer(200, headers, json.dumps(body).encode())


def _markup(status: int, code: str) -> Answer:
    content = f"<Error><Code>{code}</Code></Error>".encode()
    return Answer(status, CIMultiDict({"Content-Type": "application/xml"}), content)
