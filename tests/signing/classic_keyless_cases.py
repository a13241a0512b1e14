"""Images that are signed by identities in cosign's classic form, by cosign 2 and by cosign 3."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from tests.signing.authority import KeylessAuthority
from tests.signing.keyless_cases import write_trusted_root
from tests.signing.maker import (
    IDENTITY,
    ISSUER,
    Maker,
    digest_of,
    encoded,
    move_tag,
    signature_tag,
)
from tests.signing.tools import served, token

SIGNATURE, LOG_ENTRY = "dev.cosignproject.cosign/signature", "dev.sigstore.cosign/bundle"
PREDICATE = {"builder": {"id": "https://build.test/runner"}}
FORMER_SIGNER = "formerly"


def make_classic_keyless(maker: Maker) -> None:
    trusted = KeylessAuthority()
    authorities = {
        "trusted": trusted,
        "late": trusted.later(timedelta(hours=1)),
        "foreign": trusted.with_other("authority"),
        "elsewhere": trusted.with_other("log"),
        "unlogged": trusted.with_other("certificate log"),
    }
    write_trusted_root(maker, trusted, "formerly_root.json")
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served(each.app())) for name, each in authorities.items()}
        for name, each in authorities.items():
            directory = maker.tools.home / name
            directory.mkdir()
            each.write(directory)
        _make_good(maker, urls)
        _make_bad(maker, urls)
        _make_forged(maker, urls)


def sign_formerly(
    maker: Maker, urls: dict[str, str], reference: str, by: str = "trusted", issuer: str = ISSUER,
    identity: str = IDENTITY, command: tuple[str, ...] = ("cosign2", "sign"),
) -> None:  # fmt: skip
    (maker.tools.home / "token").write_text(token(issuer, identity))
    former = command[0] == "cosign2"
    maker.tools.run(
        *command, "--yes", "--allow-insecure-registry" if former else "--allow-http-registry",
        *(() if former else ("--new-bundle-format=false", "--use-signing-config=false")),
        f"--fulcio-url={urls[by]}", f"--rekor-url={urls[by]}", "--identity-token", "token", reference,
        SIGSTORE_ROOT_FILE=f"{by}/fulcio.pem",
        SIGSTORE_CT_LOG_PUBLIC_KEY_FILE=f"{by}/ct.pub",
        SIGSTORE_REKOR_PUBLIC_KEY=f"{by}/log.pub",
    )  # fmt: skip


def _make_good(maker: Maker, urls: dict[str, str]) -> None:
    with maker.case("formerly", FORMER_SIGNER) as (reference, _):
        sign_formerly(maker, urls, reference)
    with maker.case("formerly-by-3", FORMER_SIGNER) as (reference, _):
        sign_formerly(maker, urls, reference, command=("cosign", "sign"))
    with maker.case("formerly-email", FORMER_SIGNER, good=False) as (reference, _):
        sign_formerly(maker, urls, reference, identity="mallory@mail.test")
    with maker.case("formerly-one-of-two", FORMER_SIGNER) as (reference, _):
        sign_formerly(maker, urls, reference, identity="mallory@mail.test")
        sign_formerly(maker, urls, reference)
    (maker.tools.home / "predicate.json").write_text(json.dumps(PREDICATE))
    with maker.case("attested-formerly", FORMER_SIGNER, good=False) as (reference, _):
        attest = (
            "cosign2",
            "attest",
            "--type",
            "https://slsa.dev/provenance/v1",
            "--predicate",
            "predicate.json",
        )
        sign_formerly(maker, urls, reference, command=attest)


def _make_bad(maker: Maker, urls: dict[str, str]) -> None:
    with maker.case("formerly-other-issuer", FORMER_SIGNER, good=False) as (reference, _):
        sign_formerly(maker, urls, reference, issuer="https://elsewhere.test")
    for by in ("late", "foreign", "elsewhere", "unlogged"):
        with maker.case(f"formerly-{by}", FORMER_SIGNER, good=False) as (reference, _):
            sign_formerly(maker, urls, reference, by)
    with maker.case("formerly-other-digest", FORMER_SIGNER, good=False) as (reference, _):
        sign_formerly(maker, urls, maker.other(reference))
        move_tag(maker, reference, ".sig")


def _make_forged(maker: Maker, urls: dict[str, str]) -> None:
    def forged(name: str, edit: Any) -> None:
        with maker.case(f"formerly-{name}", FORMER_SIGNER, good=False) as (reference, case):
            sign_formerly(maker, urls, reference)
            maker.forge(reference, signature_tag(case.image), edit, maker.plain)

    def annotations(parts: Any) -> Any:
        return parts["manifest"]["layers"][0]["annotations"]

    def no_entry(parts: Any) -> None:
        del annotations(parts)[LOG_ENTRY]

    def other_key(parts: Any) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        signature = key.sign(parts["layer"], ec.ECDSA(SHA256()))
        annotations(parts)[SIGNATURE] = base64.b64encode(signature).decode()

    def other_time(parts: Any) -> None:
        entry = json.loads(annotations(parts)[LOG_ENTRY])
        entry["Payload"]["integratedTime"] -= 1
        annotations(parts)[LOG_ENTRY] = encoded(entry).decode()

    forged("no-entry", no_entry)
    forged("other-key", other_key)
    forged("other-time", other_time)
    with maker.case("formerly-tampered", FORMER_SIGNER, good=False) as (reference, case):
        sign_formerly(maker, urls, maker.other(reference))
        move_tag(maker, reference, ".sig")
        ours, other = case.image.encode(), digest_of(maker.images[1][0]).encode()

        def tampered(parts: Any) -> None:
            assert other in parts["layer"]
            parts["layer"] = parts["layer"].replace(other, ours)

        maker.forge(reference, signature_tag(case.image), tampered, maker.plain)
    with maker.case("formerly-other-entry", FORMER_SIGNER, good=False) as (reference, case):
        sign_formerly(maker, urls, reference)
        sign_formerly(maker, urls, maker.other(reference))
        repository = reference.partition("@")[0].partition("/")[2]
        found = maker.plain.manifest(repository, signature_tag(digest_of(maker.images[1][0])))
        assert found is not None
        entry = json.loads(found[1])["layers"][0]["annotations"][LOG_ENTRY]

        def swap(parts: Any) -> None:
            annotations(parts)[LOG_ENTRY] = entry

        maker.forge(reference, signature_tag(case.image), swap, maker.plain)
