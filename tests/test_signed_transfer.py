"""What signs an image goes with it: by warming, pins, and bundles to places without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import Denied, ManifestUnknown
from storage.maintenance.pins import Pin, Pins
from tests.conftest import Clock
from tests.signing.cases import LATER, cases
from tests.signing.upstreams import SIGNERS, publish
from tests.test_bundles import Opened, at
from tests.upstream import Upstream

__all__ = ["at"]  # a fixture

CASES = cases()
NAME = "docker.io/acme/app"
# One of each form, and of each way to find it; whether the upstream has the referrers API, and whether the
# first place has the policy.
FORMS = [
    ("classic-ecdsa", True, True),
    ("classic-ecdsa", False, False),
    ("bundle-ecdsa", False, True),
    ("bundle-referrers", True, True),
    ("keyless", False, True),
    ("notary-ec-cose", False, False),
    ("index", False, True),
]


@pytest.fixture
def clock() -> Clock:
    """After the signatures were made."""
    return Clock(LATER)


def policy(name: str) -> dict[str, object]:
    rule = {"name": "signed", "action": "allow", "signed_by": [CASES[name].signer]}
    return {"policy": {"rules": [rule], "signers": SIGNERS}}


@pytest.mark.parametrize(("name", "api", "policed"), FORMS)
async def test_what_was_warmed_and_carried_is_verified_without_a_network(
    at: Opened, upstream: Upstream, tmp_path: Path, name: str, api: bool, policed: bool
) -> None:
    case, upstream.referrers_api = CASES[name], api
    publish(upstream, case, "acme/app")
    async with at("home", top=policy(name) if policed else {}) as home:
        await home.fetch(NAME, "v1")
        await home.export(tmp_path / "bundle.tar", f"{NAME}:v1")
        store = home.parts.store
        assert store is not None
        kept = Pins(store, [Pin(f"{NAME}:v1")]).pinned()
        assert {*case.blobs, *case.manifests} <= {str(digest) for digest in kept.digests}
    async with at("site", offline=True, top=policy(name)) as site:
        with pytest.raises(ManifestUnknown):
            await site.manifest(NAME, case.image)
        await site.take(tmp_path / "bundle.tar")
        for reference in ("v1", case.image):
            assert (await site.manifest(NAME, reference)).digest == case.image
    # Of another signer it is not, there either.
    other = {"name": "signed", "action": "allow", "signed_by": ["other"]}
    async with at("site", offline=True, top={"policy": {"rules": [other], "signers": SIGNERS}}) as site:
        with pytest.raises(Denied, match="is not signed by other"):
            await site.manifest(NAME, "v1")


async def test_a_bundle_without_referrers_leaves_an_image_unsigned(
    at: Opened, upstream: Upstream, tmp_path: Path
) -> None:
    publish(upstream, CASES["classic-ecdsa"], "acme/app")
    async with at("home") as home:
        await home.fetch(NAME, "v1")
        await home.export(tmp_path / "bundle.tar", f"{NAME}:v1", referrers=False)
    async with at("site", offline=True, top=policy("classic-ecdsa")) as site:
        await site.take(tmp_path / "bundle.tar")
        with pytest.raises(Denied, match="it has no signature"):
            await site.manifest(NAME, "v1")


async def test_what_is_not_signed_is_not_warmed(at: Opened, upstream: Upstream) -> None:
    publish(upstream, CASES["bundle-other-key"], "acme/app")
    async with at("home", top=policy("bundle-ecdsa")) as home:
        with pytest.raises(Denied, match="is not signed by ecdsa"):
            await home.fetch(NAME, "v1")
