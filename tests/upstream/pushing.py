"""What a fake registry takes in: uploads, mounts, manifests, deletions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Protocol

from multidict import CIMultiDict

from tests.upstream.content import Content, Manifest, Repository, digest_of, referrer
from tests.upstream.messages import DIGEST, Answer, Request, failure

_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")


@dataclass(frozen=True)
class Takes:
    """What a registry does with pushes; each is a habit of some vendor.

    `absolute`: locations of uploads name the host, `elsewhere` even another one, which wants no
    Authorization.  `mounts`, `several_tags`, `single_post`: it knows that request.  `checks`: a manifest is
    refused if what it names is not there.  `deletes`: tags and manifests and blobs can be deleted.
    """

    absolute: bool = False
    elsewhere: bool = False
    mounts: bool = True
    several_tags: bool = True
    single_post: bool = False
    checks: bool = False
    deletes: bool = True


class _Upload:
    def __init__(self, repository: str) -> None:
        self.repository = repository
        self.content = b""
        self.steps = 0  # of which each gets a location of its own


class Taking(Protocol):
    takes: Takes | None
    referrers_api: bool
    digest_header: bool
    repositories: dict[str, Repository]

    @property
    def url(self) -> str: ...

    @property
    def cdn_url(self) -> str: ...


class Uploads:
    """The push half of a registry.  distribution-spec, "Push" and "Content Management"."""

    def __init__(self, registry: Taking, content: Content) -> None:
        self._registry = registry
        self._content = content
        self._open: dict[str, _Upload] = {}
        self._begun = 0

    @property
    def open(self) -> list[bytes]:
        """What the uploads hold that have neither been closed nor cancelled."""
        return [each.content for each in self._open.values()]

    def respond(self, request: Request, takes: Takes) -> Answer:
        if request.kind == "upload":
            if request.method == "POST":
                return self._begin(request, takes)
            return self._go_on(request, takes)
        if request.method == "PUT" and request.kind == "manifest":
            return self._manifest(request, takes)
        if request.method == "DELETE" and request.kind in ("manifest", "blob"):
            return self._delete(request, takes)
        return failure(405, "UNSUPPORTED", request.method)

    # Uploads

    def _begin(self, request: Request, takes: Takes) -> Answer:
        repository, query = request.repository or "", request.query
        digest = query.get("mount")
        if digest is not None and takes.mounts:
            holders = self._registry.repositories
            among = [query["from"]] if "from" in query else list(holders)  # "MAY cross-mount"
            for holder in (holders[name] for name in among if name in holders):
                if digest in holder.blobs:
                    self._content.blob(repository, holder.blobs[digest], digest.partition(":")[0])
                    return self._created(repository, digest)
        if "digest" in query and takes.single_post:
            return self._keep(repository, query["digest"], request.body)
        if query.get("digest-algorithm", "sha256") not in ("sha256", "sha512"):
            return failure(400, "DIGEST_INVALID", query["digest-algorithm"])
        self._begun += 1
        name = f"upload-{self._begun}"
        self._open[name] = _Upload(repository)
        return self._on(name, 202, takes)

    def _on(self, name: str, status: int, takes: Takes) -> Answer:
        """Where it goes on; never where it was before, and with escapes that are no others' business."""
        upload = self._open[name]
        upload.steps += 1
        home = self._registry.cdn_url if takes.elsewhere else self._registry.url if takes.absolute else ""
        location = f"{home}/v2/{upload.repository}/blobs/uploads/{name}?_state={self._state(upload)}"
        last = max(0, len(upload.content) - 1)
        headers = {"Location": location, "Range": f"0-{last}", "Docker-Upload-UUID": name}
        return Answer(status, CIMultiDict(headers))

    def _state(self, upload: _Upload) -> str:
        return f"{upload.steps}%2Fa%20b%3d%2B~"

    def _go_on(self, request: Request, takes: Takes) -> Answer:
        name = request.reference or ""
        upload = self._open.get(name)
        state, _, rest = request.target.partition("?")[2].partition("&")
        if upload is None or request.repository != upload.repository:
            return failure(404, "BLOB_UPLOAD_UNKNOWN", name)
        if request.method == "DELETE":  # by any of its locations, as it may have been cut off
            del self._open[name]
            return Answer(204, CIMultiDict())
        if state != f"_state={self._state(upload)}":
            return failure(404, "BLOB_UPLOAD_INVALID", "that is not the location it was given")
        if request.method == "GET":
            return self._on(name, 204, takes)
        if request.body and request.headers.get("Content-Type") != "application/octet-stream":
            return failure(400, "BLOB_UPLOAD_INVALID", "not octets")
        upload.content += request.body
        if request.method == "PATCH" and not rest:
            return self._on(name, 202, takes)
        digest = request.query.get("digest", "")
        if request.method != "PUT" or not DIGEST.fullmatch(digest):
            return failure(400, "DIGEST_INVALID", digest)
        answer = self._keep(upload.repository, digest, upload.content)
        if answer.status == 201:
            del self._open[name]
        return answer

    def _keep(self, repository: str, digest: str, content: bytes) -> Answer:
        algorithm = digest.partition(":")[0]
        if digest_of(content, algorithm) != digest:
            return failure(400, "DIGEST_INVALID", "provided digest did not match uploaded content")
        self._content.blob(repository, content, algorithm)
        return self._created(repository, digest)

    def _created(self, repository: str, digest: str, what: str = "blobs") -> Answer:
        headers = CIMultiDict({"Location": f"/v2/{repository}/{what}/{digest}"})
        if self._registry.digest_header:
            headers["Docker-Content-Digest"] = digest
        return Answer(201, headers)

    # Manifests

    def _manifest(self, request: Request, takes: Takes) -> Answer:
        repository, reference = request.repository or "", request.reference or ""
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip()
        algorithm = reference.partition(":")[0] if ":" in reference else "sha256"
        if ":" in reference and digest_of(request.body, algorithm) != reference:
            return failure(400, "DIGEST_INVALID", reference)
        if missing := self._missing(repository, request.body) if takes.checks else []:
            errors = [
                {"code": "MANIFEST_BLOB_UNKNOWN", "message": "unknown", "detail": {"digest": digest}}
                for digest in missing
            ]
            answer = failure(400, "MANIFEST_BLOB_UNKNOWN")
            answer.content = json.dumps({"errors": errors}).encode()
            return answer
        tags = [] if ":" in reference else [reference]
        more = request.query.getall("tag", []) if takes.several_tags and not tags else []
        for tag in (*tags, *more):
            if not _TAG.fullmatch(tag):
                return failure(400, "TAG_INVALID", tag)
        manifest = Manifest(digest_of(request.body, algorithm), media_type, request.body)
        self._content.manifest(repository, manifest.content, media_type, algorithm=algorithm)
        for tag in (*tags, *more):
            self._content.manifest(repository, manifest.content, media_type, tag, algorithm)
        answer = self._created(repository, manifest.digest, "manifests")
        if more:
            answer.headers["OCI-Tag"] = ", ".join(more)
        subject = referrer(manifest)[0]
        if subject and self._registry.referrers_api:
            answer.headers["OCI-Subject"] = subject
        return answer

    def _missing(self, repository: str, content: bytes) -> list[str]:
        """distribution-spec, "Pushing Manifests": what it names, but for its subject."""
        holder = self._registry.repositories.get(repository, Repository())
        body = json.loads(content)
        blobs = [body["config"]] if body.get("config") else []
        blobs += body.get("layers") or []
        missing = [each["digest"] for each in blobs if each["digest"] not in holder.blobs]
        children = [each["digest"] for each in body.get("manifests") or []]
        return missing + [each for each in children if each not in holder.manifests]

    def _delete(self, request: Request, takes: Takes) -> Answer:
        if not takes.deletes:
            return failure(405, "UNSUPPORTED", "deletion is off")
        repository, reference = request.repository or "", request.reference or ""
        holder = self._registry.repositories.get(repository)
        if holder is None:
            return failure(404, "NAME_UNKNOWN", repository)
        if request.kind == "blob":
            if reference not in holder.blobs:
                return failure(404, "BLOB_UNKNOWN", reference)
            self._content.delete_blob(repository, reference)
        elif ":" in reference and reference in holder.manifests:
            self._content.delete_manifest(repository, reference)
        elif reference in holder.tags:
            self._content.delete_tag(repository, reference)
        else:
            return failure(404, "MANIFEST_UNKNOWN", reference)
        return Answer(202, CIMultiDict())
