"""Images that are signed by identities."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.signing.authority import KeylessAuthority
from tests.signing.maker import (
    IDENTITY,
    ISSUER,
    Maker,
    digest_of,
    encoded,
    move_tag,
    payload_edit,
    signature_tag,
)
from tests.signing.timestamps import TimestampAuthority
from tests.signing.tools import served, token


def make_keyless(maker: Maker) -> None:
    trusted, foreign = KeylessAuthority(), KeylessAuthority()
    late = trusted.later(timedelta(hours=1))
    began = write_trusted_root(maker, trusted, "trusted_root.json")
    with ExitStack() as stack:
        urls = {}
        for name, authority in (("trusted", trusted), ("late", late), ("foreign", foreign)):
            urls[name] = stack.enter_context(served(authority.app()))
            start = f"api-version=1,start-time={began},operator=test"
            maker.tools.run(
                "cosign", "signing-config", "create", "--out", f"{name}.json",
                "--fulcio", f"url={urls[name]},{start}", "--rekor", f"url={urls[name]},{start}",
                "--rekor-config", "ANY",
            )  # fmt: skip
        _make_keyless_cases(maker)


def write_trusted_root(maker: Maker, authority: KeylessAuthority, name: str) -> str:
    """Have cosign write a trusted root, and return since when it is trusted."""
    authority.write(maker.tools.home)
    began = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    maker.tools.run(
        "cosign", "trusted-root", "create", "--out", name,
        "--fulcio", "url=http://fulcio.test,certificate-chain=fulcio.pem",
        "--rekor", f"url=http://log.test,public-key=log.pub,start-time={began}",
        "--ctfe", f"url=http://ct.test,public-key=ct.pub,start-time={began}",
    )  # fmt: skip
    shutil.copy(maker.tools.home / name, maker.target / name)
    return began


def sign_keyless(
    maker: Maker, reference: str, by: str = "trusted", issuer: str = ISSUER, identity: str = IDENTITY
) -> None:
    (maker.tools.home / "token").write_text(token(issuer, identity))
    maker.tools.run(
        "cosign", "sign", "--yes", "--allow-http-registry", "--signing-config", f"{by}.json",
        "--identity-token", "token", reference,
    )  # fmt: skip


def _make_keyless_cases(maker: Maker) -> None:
    with maker.case("keyless", "keyless") as (reference, _):
        sign_keyless(maker, reference)
    with maker.case("keyless-other-identity", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, identity="mallory@mail.test")
    with maker.case("keyless-other-issuer", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, issuer="https://elsewhere.test")
    with maker.case("keyless-foreign", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, "foreign")
    with maker.case("keyless-late", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, "late")
    with maker.case("keyless-other-digest", "keyless", good=False) as (reference, _):
        sign_keyless(maker, maker.other(reference))
        move_tag(maker, reference, "")
    with maker.case("keyless-tampered", "keyless", good=False) as (reference, case):
        sign_keyless(maker, maker.other(reference))
        move_tag(maker, reference, "")
        ours, other = (
            each.partition(":")[2].encode() for each in (case.image, digest_of(maker.images[1][0]))
        )
        change = payload_edit(lambda payload: payload.replace(other, ours))
        maker.forge(reference, signature_tag(case.image, ""), change, maker.plain)
    with maker.case("keyless-no-log", "keyless", good=False) as (reference, case):
        sign_keyless(maker, reference)

        def drop(parts: Any) -> None:
            bundle = json.loads(parts["layer"])
            del bundle["verificationMaterial"]["tlogEntries"]
            parts["layer"] = encoded(bundle)

        maker.forge(reference, signature_tag(case.image, ""), drop, maker.plain)


def make_timestamped(maker: Maker) -> None:
    """Signatures whose time is vouched for by an authority (RFC 3161), and one for which nobody vouches."""
    authority, timestamps = KeylessAuthority(), TimestampAuthority(maker.tools.home / "timestamps")
    authority.write(maker.tools.home)
    began = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    maker.tools.run(
        "cosign", "trusted-root", "create", "--out", "timestamped.json",
        "--fulcio", "url=http://fulcio.test,certificate-chain=fulcio.pem",
        "--rekor", f"url=http://log.test,public-key=log.pub,start-time={began}",
        "--ctfe", f"url=http://ct.test,public-key=ct.pub,start-time={began}",
        "--tsa", f"url=http://timestamps.test,certificate-chain={timestamps.chain}",
    )  # fmt: skip
    shutil.copy(maker.tools.home / "timestamped.json", maker.target / "timestamped_root.json")
    with served(authority.app()) as url, served(timestamps.app()) as stamping:
        start = f"api-version=1,start-time={began},operator=test"
        maker.tools.run(
            "cosign", "signing-config", "create", "--out", "timestamping.json",
            "--fulcio", f"url={url},{start}", "--rekor", f"url={url},{start}", "--rekor-config", "ANY",
            "--tsa", f"url={stamping}/timestamp,{start}", "--tsa-config", "ANY",
        )  # fmt: skip
        for name, good, edit in (
            ("timestamped", True, None),
            ("timestamped-only", True, _drop_promise),
            ("timestamped-not", False, _drop_both),
        ):
            with maker.case(name, "timestamped", good=good) as (reference, case):
                sign_keyless(maker, reference, "timestamping")
                if edit is not None:
                    maker.forge(reference, signature_tag(case.image, ""), edit, maker.plain)


def _drop_promise(parts: Any) -> None:
    """Only the timestamp says when it was signed; the log still proves that it has the entry."""
    bundle = json.loads(parts["layer"])
    del bundle["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]
    parts["layer"] = encoded(bundle)


def _drop_both(parts: Any) -> None:
    _drop_promise(parts)
    bundle = json.loads(parts["layer"])
    del bundle["verificationMaterial"]["timestampVerificationData"]
    parts["layer"] = encoded(bundle)
