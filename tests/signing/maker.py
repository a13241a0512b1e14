"""The cases of tests/data/signatures while they are made: see make.py."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.signing.cases import ROOTS, VERIFYING
from tests.signing.tools import HTTPRegistry, Tools

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ISSUER, IDENTITY = "https://tokens.test", "https://git.test/acme/app/release@refs/tags/v1"
Edit = Callable[[Any], None]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass
class Case:
    """A repository: its image, by whom it claims to be signed, and the verdict of a tool, if one is asked."""

    name: str
    signer: str
    good: bool
    image: str
    commands: list[str] = field(default_factory=list)
    accepted: bool | None = None
    said: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)


class Maker:
    """Makes the cases at a registry without the referrers API, and one with it."""

    def __init__(self, target: Path, tools: Tools, plain: HTTPRegistry, listing: HTTPRegistry) -> None:
        self.target, self.tools, self.plain, self.listing = target, tools, plain, listing
        self.cases: list[Case] = []
        self.content: dict[str, Any] = {}  # text, or a list of one text in base64
        self.images = [self._image(each) for each in (b"the image", b"another image")]

    @contextmanager
    def case(
        self, name: str, signer: str, good: bool = True, listing: bool = False
    ) -> Iterator[tuple[str, Case]]:
        """The reference of the image in a repository of its own; what signs it is kept after the block."""
        registry = self.listing if listing else self.plain
        repository = f"local/{name}"
        for content, blobs in self.images:
            for blob in blobs:
                registry.push_blob(repository, blob, digest_of(blob))
            registry.push_manifest(repository, digest_of(content), MANIFEST, content)
        image = digest_of(self.images[0][0])
        registry.push_manifest(repository, "v1", MANIFEST, self.images[0][0])
        self.tools.commands.clear()
        case = Case(name, signer, good, image)
        yield f"{registry.host}/{repository}@{image}", case
        case.commands = [each.replace(registry.host, "registry.test") for each in self.tools.commands]
        self.cases.append(case)
        self._verdict(case, registry)
        self._keep(case, registry)

    def other(self, reference: str) -> str:
        """The other image in the same repository."""
        return reference.partition("@")[0] + "@" + digest_of(self.images[1][0])

    def _image(self, layer: bytes) -> tuple[bytes, list[bytes]]:
        config = encoded(
            {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
        )
        named = [
            {"mediaType": kind, "digest": digest_of(content), "size": len(content)}
            for kind, content in (
                ("application/vnd.oci.image.config.v1+json", config),
                ("application/vnd.oci.image.layer.v1.tar", layer),
            )
        ]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": named[0], "layers": named[1:]}
        return encoded(manifest), [config, layer]

    # Forgeries

    def forge(self, reference: str, tag: str, edit: Edit, registry: HTTPRegistry) -> None:
        """Replace what `tag` leads to by what `edit` makes of it: it gets the manifest and the only layer."""
        repository = reference.partition("@")[0].partition("/")[2]
        found = registry.manifest(repository, tag)
        assert found is not None, tag
        media_type, content = found
        if media_type == INDEX:
            index = json.loads(content)
            (entry,) = index["manifests"]
            found = registry.manifest(repository, entry["digest"])
            assert found is not None
            content = self._edited(repository, found[1], edit, registry)
            entry |= {"digest": digest_of(content), "size": len(content)}
            registry.push_manifest(repository, entry["digest"], MANIFEST, content)
            content = encoded(index)
        else:
            content = self._edited(repository, content, edit, registry)
        registry.push_manifest(repository, tag, media_type, content)

    def _edited(self, repository: str, manifest: bytes, edit: Edit, registry: HTTPRegistry) -> bytes:
        found = json.loads(manifest)
        layer = found["layers"][0]
        content = registry.blob(repository, layer["digest"])
        parts = {"manifest": found, "layer": content}
        edit(parts)
        layer |= {"digest": digest_of(parts["layer"]), "size": len(parts["layer"])}
        registry.push_blob(repository, parts["layer"], layer["digest"])
        return encoded(found)

    # What is kept

    def _verdict(self, case: Case, registry: HTTPRegistry) -> None:
        if case.name.startswith("attested"):
            return  # the tools verify signatures by another command
        image = f"{registry.host}/local/{case.name}@{case.image}"
        if case.signer.startswith("notary"):
            ran = self.tools.verify_with_notation(image, self.target / f"{case.signer}.pem")
        elif case.signer in ROOTS:
            ran = self.tools.verify_with_cosign(
                image, "--trusted-root", str(self.target / ROOTS[case.signer]),
                "--certificate-identity", IDENTITY, "--certificate-oidc-issuer", ISSUER,
                *VERIFYING.get(case.signer, ()),
            )  # fmt: skip
        else:
            ran = self.tools.verify_with_cosign(
                image, "--key", str(self.target / f"{case.signer}.pub"), "--insecure-ignore-tlog",
                *(["--experimental-oci11"] if case.signer == "referring" else []),
            )  # fmt: skip
        case.accepted = ran.code == 0
        lines = [
            each for each in ran.said.replace(registry.host, "registry.test").splitlines() if each.strip()
        ]
        case.said = (lines[-1] if lines else "")[:300]
        print(f"{'ok ' if case.accepted == case.good else 'NO '} {case.name}: {case.said}")

    def _keep(self, case: Case, registry: HTTPRegistry) -> None:
        repository = f"local/{case.name}"
        for tag in registry.listed(repository, "tags/list").get("tags") or []:
            found = registry.manifest(repository, tag)
            assert found is not None
            case.tags[tag] = self._keep_manifest(case, registry, *found)
        self._keep_referrers(case, registry)

    def _keep_referrers(self, case: Case, registry: HTTPRegistry) -> None:
        for entry in registry.listed(f"local/{case.name}", f"referrers/{case.image}").get("manifests") or []:
            found = registry.manifest(f"local/{case.name}", entry["digest"])
            assert found is not None
            self._keep_manifest(case, registry, *found)

    def _keep_manifest(self, case: Case, registry: HTTPRegistry, media_type: str, content: bytes) -> str:
        digest = digest_of(content)
        if digest not in case.manifests:
            case.manifests[digest] = media_type
            self._keep_content(content)
            found = json.loads(content)
            for entry in found.get("manifests") or []:
                child = registry.manifest(f"local/{case.name}", entry["digest"])
                assert child is not None
                self._keep_manifest(case, registry, *child)
            for entry in [*filter(None, [found.get("config")]), *(found.get("layers") or [])]:
                blob = registry.blob(f"local/{case.name}", entry["digest"])
                case.blobs.append(self._keep_content(blob))
        return digest

    def _keep_content(self, content: bytes) -> str:
        digest = digest_of(content)
        try:
            self.content[digest] = content.decode()
        except UnicodeDecodeError:
            self.content[digest] = [base64.b64encode(content).decode()]
        return digest

    def finish(self) -> None:
        """Write what was made, beside what is there of other cases."""
        made = {each.name: vars(each) for each in self.cases}
        if (self.target / "cases.json").exists():
            former = json.loads((self.target / "cases.json").read_text())
            made = {each["name"]: each for each in former} | made
            self.content = json.loads((self.target / "content.json").read_text()) | self.content
        rows = [made[name] for name in sorted(made)]
        for name, value in (("cases", rows), ("content", self.content)):
            (self.target / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def signature_tag(digest: str, suffix: str = ".sig") -> str:
    return digest.replace(":", "-") + suffix


def move_tag(maker: Maker, reference: str, suffix: str) -> None:
    """What signs the other image is shown as what signs this one."""
    repository, _, digest = reference.partition("/")[2].partition("@")
    other = digest_of(maker.images[1][0])
    found = maker.plain.manifest(repository, signature_tag(other, suffix))
    assert found is not None
    maker.plain.push_manifest(repository, signature_tag(digest, suffix), *found)


def payload_edit(change: Callable[[bytes], bytes]) -> Edit:
    """Change the payload in the envelope of a bundle, and nothing else."""

    def edit(parts: Any) -> None:
        bundle = json.loads(parts["layer"])
        envelope = bundle["dsseEnvelope"]
        envelope["payload"] = base64.b64encode(change(base64.b64decode(envelope["payload"]))).decode()
        parts["layer"] = encoded(bundle)

    return edit
