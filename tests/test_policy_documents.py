"""What counts as a document: the content of signatures, attestations and SBOMs, by its type and its bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest

from proxy.policy.documents import HEADER, is_document
from tests.conftest import Serve
from tests.test_policed import SIGNED, Allowing, condition, policy, refusal, status
from tests.upstream import OCI_MANIFEST, Manifest, Status, Upstream
from tests.upstream.content import OCI_INDEX, describe

__all__ = ["condition"]  # a fixture

TEXT = b'{"a": [1, 2]}'


def tar(name: str = "bin/sh", form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def of_text(name: bytes) -> bytes:
    """A tar whose header is all text, as no rule of the format forbids."""
    header = bytearray(tar(form=tarfile.USTAR_FORMAT)[:HEADER].replace(b"\0", b" "))
    header[:100] = name.ljust(100)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o  " % sum(header)
    return bytes(header)


def with_a_binary_checksum() -> bytes:
    header = tar('{"a":1}')[:HEADER]
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return header[:148] + b"\x80" + total.to_bytes(7) + header[156:]


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        b"",
        b"{",
        b" \n[]",
        b"\xef\xbb\xbf{}",
        b"SPDXVersion: SPDX-2.3\n",
        b"<bom/>",
        json.dumps({"text": "1234567 " * 200}).encode(),
        b"\xd2\x84\x43\xa1\x01\x26",
        b"\x84\x43\xa1\x01\x26",
    ],
)
def test_documents(content: bytes) -> None:
    assert is_document(content[:HEADER])


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(TEXT, mtime=0),
        bz2.compress(TEXT),
        lzma.compress(TEXT),
        bytes.fromhex("28b52ffd0400"),
        bytes.fromhex("502a4d1800000000"),  # a frame of zstd that is skipped
        bytes.fromhex("04224d186440"),
        tar(),
        tar('{"a": 1}', tarfile.USTAR_FORMAT),
        tar("<a>", tarfile.GNU_FORMAT),
        of_text(b'{"a":"'),
        with_a_binary_checksum(),
        b"\x7fELF\x02\x01",
        b"\0asm\x01\0\0\0",
        b"\0" * 1024,
    ],
)
def test_what_is_no_document(content: bytes) -> None:
    assert not is_document(content[:HEADER])


def artifact(upstream: Upstream, about: Manifest, layer: bytes, tag: str | None = None) -> dict[str, str]:
    """An image whose layer has the type of a document; it is about another by `tag` or by its subject."""
    plain = upstream.image("a/b", None, [layer])
    body = json.loads(plain.content)
    body["layers"][0]["mediaType"] = "application/vnd.dev.cosign.simplesigning.v1+json"
    if tag is None:
        body["subject"] = {"mediaType": OCI_MANIFEST, "digest": about.digest, "size": len(about.content)}
    return {"manifests": upstream.manifest("a/b", body, tag=tag), "blobs": plain.layers[0]}


@pytest.mark.parametrize("tagged", [False, True])
async def test_an_image_is_no_signature_by_the_types_of_its_layers(
    serve: Serve, upstream: Upstream, condition: Allowing, tagged: bool
) -> None:
    good = upstream.image("a/b", "v1", [b"good"])
    condition.met = {good.digest}
    site = await serve(upstream, top=policy(SIGNED))
    tag = good.digest.replace(":", "-") + ".sig" if tagged else None
    assert await status(site, "v1") == 200
    for layer in (gzip.compress(tar()), of_text(b'{"a":"')):
        for kind, digest in artifact(upstream, good, layer, tag).items():
            await refusal(site, tag if tag and kind == "manifests" else digest, kind)
        site.clock.advance(601)
    for kind, digest in artifact(upstream, good, TEXT, tag).items():
        assert await status(site, tag if tag and kind == "manifests" else digest, kind) == 200


@pytest.mark.parametrize("member", ["config", "manifests"])
async def test_an_artifact_does_not_lead_to_the_layers_of_what_is_refused(
    serve: Serve, upstream: Upstream, condition: Allowing, member: str
) -> None:
    good = upstream.image("a/b", "v1", [b"good"])
    bad = upstream.image("a/b", "v2", [gzip.compress(tar())])
    condition.met = {good.digest}
    taken = describe("application/json", bad.layers[0], len(bad.content))
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST if member == "config" else OCI_INDEX,
        "subject": describe(OCI_MANIFEST, good.digest, len(good.content)),
        **({"config": taken, "layers": []} if member == "config" else {"manifests": [taken]}),
    }
    digest = upstream.manifest("a/b", body, tag="edge")
    site = await serve(upstream, top=policy(SIGNED))
    await refusal(site, "v2")
    await refusal(site, "edge")
    await refusal(site, digest)
    await refusal(site, bad.layers[0], "blobs")


async def test_a_signature_whose_content_is_not_there_yet_is_not_refused_for_good(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    good = upstream.image("a/b", "v1", [b"good"])
    condition.met = {good.digest}
    about = artifact(upstream, good, TEXT)
    site = await serve(upstream, top=policy(SIGNED))
    upstream.next("GET", about["blobs"], Status(404))
    assert await status(site, about["manifests"]) == 403
    site.clock.advance(601)
    assert await status(site, about["manifests"]) == 200
