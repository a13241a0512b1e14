"""The verdicts of cosign and notation themselves, about images that they pull through a server.

The tools are not installed by .ci/run; docs/policy.md says with which versions this was run.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Clock, Serve, Site
from tests.signing.cases import DATA, LATER, ROOTS, VERIFYING, SignedCase, cases
from tests.signing.tools import Ran, Tools
from tests.signing.upstreams import SIGNERS, publish
from tests.upstream import Upstream

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not (shutil.which("cosign") and shutil.which("notation")), reason="not installed"),
]
CASES = cases()
# Where Entrepôt judges otherwise than the tool: docs/policy.md says why.
OTHERWISE = {"classic-p384", "bundle-p384"}
IDENTITY = ("--certificate-identity-regexp", "https://git.test/acme/.*")
ISSUER = ("--certificate-oidc-issuer", "https://tokens.test")


@pytest.fixture
def clock() -> Clock:
    """After the signatures were made."""
    return Clock(LATER)


def verify(tools: Tools, image: str, case: SignedCase) -> Ran:
    if case.signer.startswith("notary"):
        return tools.verify_with_notation(image, DATA / f"{case.signer}.pem")
    if case.signer in ROOTS:
        root = ("--trusted-root", str(DATA / ROOTS[case.signer]))
        return tools.verify_with_cosign(image, *root, *VERIFYING.get(case.signer, ()), *IDENTITY, *ISSUER)
    return tools.verify_with_cosign(
        image, "--key", str(DATA / f"{case.signer}.pub"), "--insecure-ignore-tlog",
        *(["--experimental-oci11"] if case.signer == "referring" else []),
    )  # fmt: skip


async def served(site: Site, repository: str, case: SignedCase) -> bool:
    status, _, body = await site.get(f"/v2/{repository}/manifests/{case.image}")
    assert status == 200 or json.loads(body)["errors"][0]["code"] == "DENIED"
    return status == 200


async def test_the_tools_agree_with_each_verdict(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    for name, case in CASES.items():
        publish(upstream, case, f"{case.signer}/{name}")
    rules = [
        {"name": name, "action": "allow", "repositories": [f"docker.io/{name}/*"], "signed_by": [name]}
        for name in SIGNERS
    ]
    plain = await serve(upstream)
    judging = await serve(
        upstream, directory=tmp_path / "judging", top={"policy": {"rules": rules, "signers": SIGNERS}}
    )
    tools = Tools(tmp_path / "tools")
    tools.home.mkdir()
    for name, case in CASES.items():
        repository = f"{case.signer}/{name}"
        image = f"{plain.url.removeprefix('http://')}/{repository}@{case.image}"
        good = await served(judging, repository, case)
        assert good == case.good, name
        if case.accepted is None:
            continue
        ran = await asyncio.to_thread(verify, tools, image, case)
        assert (ran.code == 0) == (good != (name in OTHERWISE)), (name, ran.said)
