"""Images that are served because they are signed, and those that are not, with a network and without."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Clock, Serve, Site, configuration
from tests.signing.cases import LATER, SignedCase, cases, content
from tests.signing.upstreams import SIGNERS, publish
from tests.upstream import OCI_INDEX, Upstream

CASES = cases()
PROVENANCE = "https://slsa.dev/provenance/v1"


@pytest.fixture
def clock() -> Clock:
    """After the signatures were made."""
    return Clock(LATER)


def signed(*names: str, **more: Any) -> dict[str, Any]:
    return {"name": "signed", "action": "allow", "signed_by": list(names), **more}


def policy(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"policy": {"rules": list(rules), "signers": SIGNERS, **more}}


BY_SIGNER = [
    {"name": f"by-{name}", "action": "allow", "repositories": [f"docker.io/{name}/*"], "signed_by": [name]}
    for name in SIGNERS
]


async def pull(site: Site, repository: str, reference: str, kind: str = "manifests") -> tuple[int, str]:
    """The status, and what the error says."""
    status, _, body = await site.get(f"/v2/{repository}/{kind}/{reference}")
    return status, "" if status == 200 else json.loads(body)["errors"][0]["message"]


async def verdicts(site: Site) -> dict[str, bool]:
    """Which of all cases are served: by tag, by digest, and with their blobs alike."""
    found = {}
    for name, case in CASES.items():
        repository = f"{case.signer}/{name}"
        told = [await pull(site, repository, reference) for reference in ("v1", case.image)]
        blobs = [each["digest"] for each in json.loads(content(case.image)).get("layers", [])]
        told += [await pull(site, repository, each, "blobs") for each in blobs]
        assert len({status for status, _ in told}) == 1, (name, told)
        assert all(f"by-{case.signer} refuses" in said for status, said in told if status != 200)
        found[name] = told[0][0] == 200
    return found


@pytest.mark.clients
@pytest.mark.parametrize("api", [True, False], ids=["referrers", "fallback tag"])
async def test_what_is_signed_is_served_with_a_network_and_without(
    serve: Serve, upstream: Upstream, api: bool
) -> None:
    upstream.referrers_api = api
    for name, case in CASES.items():
        publish(upstream, case, f"{case.signer}/{name}")
    # An upstream without the referrers API does not show what only that lists.
    wanted = {name: case.good and (api or not name.endswith("-referrers")) for name, case in CASES.items()}
    site = await serve(upstream, top=policy(*BY_SIGNER))
    assert await verdicts(site) == wanted
    await site.app.stop()
    upstream.clear()
    # Nothing is remembered of what was verified; all of it is again, from the disk.
    site = await serve(upstream, top={**policy(*BY_SIGNER), "offline": True})
    assert await verdicts(site) == wanted
    assert upstream.log == []


async def one(serve: Serve, upstream: Upstream, name: str, *rules: dict[str, Any]) -> tuple[Site, SignedCase]:
    case = CASES[name]
    publish(upstream, case, "acme/app")
    return await serve(upstream, top=policy(*rules)), case


async def test_a_refusal_names_why(serve: Serve, upstream: Upstream) -> None:
    site, _ = await one(serve, upstream, "bundle-tampered", signed("ecdsa", "keyless"))
    assert await pull(site, "acme/app", "v1") == (
        403,
        "policy rule signed refuses docker.io/acme/app:v1: it is not signed by ecdsa or keyless"
        " (ecdsa: the signature is by another key, or the content was changed;"
        " keyless: it is signed by a key, not by the certificate of an identity)."
        " Pull what the policy allows, or ask the operator of this server",
    )


async def test_an_image_without_a_signature_is_refused(serve: Serve, upstream: Upstream) -> None:
    site, case = await one(serve, upstream, "unsigned", signed("ecdsa"))
    assert "v1: it has no signature." in (await pull(site, "acme/app", "v1"))[1]
    assert "it has no signature." in (await pull(site, "acme/app", case.image))[1]


@pytest.mark.parametrize(
    ("rule", "good"),
    [
        (signed("rsa", "ecdsa"), True),
        (signed("rsa", "keyless"), False),
        ({"signed_by_all": ["ecdsa", "other"]}, True),
        ({"signed_by_all": ["ecdsa", "rsa"]}, False),
        (signed("rsa", "other", signed_by_all=["ecdsa"]), True),
        (signed("rsa", signed_by_all=["ecdsa"]), False),
    ],
)
async def test_one_signer_of_several_or_all(
    serve: Serve, upstream: Upstream, rule: dict[str, Any], good: bool
) -> None:
    site, _ = await one(serve, upstream, "classic-both-keys", {"name": "signed", "action": "allow", **rule})
    assert (await pull(site, "acme/app", "v1"))[0] == (200 if good else 403)


async def test_an_index_that_is_signed_vouches_for_its_children(serve: Serve, upstream: Upstream) -> None:
    case = CASES["index"]
    site, _ = await one(serve, upstream, "index", signed("ecdsa"))
    (child,) = [each["digest"] for each in json.loads(content(case.image))["manifests"]]
    assert (await pull(site, "acme/app", child))[0] == 403  # nothing leads to it yet
    assert (await pull(site, "acme/app", "v1"))[0] == 200
    assert (await pull(site, "acme/app", child))[0] == 200
    layer = json.loads(content(child))["layers"][0]["digest"]
    assert (await pull(site, "acme/app", layer, "blobs"))[0] == 200
    await site.app.stop()
    site = await serve(upstream, top={**policy(signed("ecdsa")), "offline": True})
    assert (await pull(site, "acme/app", child))[0] == 200  # what is stored tells


async def test_what_signs_another_image_does_not_sign_this_one_by_its_subject(
    serve: Serve, upstream: Upstream
) -> None:
    case = CASES["bundle-other-digest"]
    for digest in case.manifests:
        forged = json.loads(content(digest))
        if forged.get("subject"):
            forged["subject"]["digest"] = case.image
            publish(upstream, case, "acme/app")
            upstream.repositories["acme/app"].tags = {"v1": case.image}
            upstream.manifest("acme/app", forged)
    site = await serve(upstream, top=policy(signed("ecdsa")))
    status, said = await pull(site, "acme/app", "v1")
    assert status == 403 and "ecdsa: the signature is of another digest, sha256:" in said


# Attestations


def attested(*by: str, kind: str = PROVENANCE, **more: Any) -> dict[str, Any]:
    return {"name": "attested", "action": "allow", "attested": [{"type": kind, "signed_by": [*by], **more}]}


BUILDER = 'predicate.runDetails.builder.id == "https://build.test/runner"'


@pytest.mark.clients
async def test_an_attestation_is_asked_for(serve: Serve, upstream: Upstream) -> None:
    wanted = [
        (attested("ecdsa"), ""),
        (attested("ecdsa", when=BUILDER), ""),
        (attested("ecdsa", when="image.startsWith('docker.io/acme/')"), ""),
        (attested("ecdsa", when="now > timestamp('2026-01-01T00:00:00Z')"), ""),
        (attested("rsa", "ecdsa", when="digest.startsWith('sha256:')"), ""),
        (attested("rsa"), f"has no {PROVENANCE} by rsa (rsa: the signature is by another key"),
        (attested("ecdsa", kind="https://spdx.dev/Document"), "has no https://spdx.dev/Document by ecdsa."),
        (
            attested("ecdsa", when="predicate.runDetails.builder.id == 'x'"),
            f"has {PROVENANCE} by ecdsa, but \"predicate.runDetails.builder.id == 'x'\" is not true of it.",
        ),
        (
            attested("ecdsa", when="predicate.scanner.critical == 0"),
            "cannot be evaluated: KeyError: 'scanner'",
        ),
        (
            attested("ecdsa", when="predicate.runDetails"),
            "cannot be evaluated: its value is dict",
        ),
        (signed("ecdsa"), "is not signed by ecdsa."),
    ]
    rules = []
    for number, (rule, _) in enumerate(wanted):
        for case in ("attested-provenance", "attested-classic"):
            publish(upstream, CASES[case], f"acme/{case}-{number}")
        rules.append({**rule, "name": f"rule-{number}", "repositories": [f"docker.io/acme/*-{number}"]})
    site = await serve(upstream, top=policy(*rules))
    for number, (_, says) in enumerate(wanted):
        for case in ("attested-provenance", "attested-classic"):
            status, said = await pull(site, f"acme/{case}-{number}", "v1")
            assert status == (403 if says else 200) and says in said


async def test_an_expression_of_the_time_is_evaluated_again(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    when = f"now < timestamp('{datetime.fromtimestamp(clock.now + 100, UTC).isoformat()}')"
    site, case = await one(serve, upstream, "attested-provenance", attested("ecdsa", when=when))
    assert (await pull(site, "acme/app", case.image))[0] == 200
    clock.advance(99)
    assert (await pull(site, "acme/app", case.image))[0] == 200
    clock.advance(62)
    assert "is not true of it" in (await pull(site, "acme/app", case.image))[1]


async def test_a_signature_that_expires_is_no_longer_enough(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, case = await one(serve, upstream, "notary-unexpired-jws", signed("notary-ec"))
    assert (await pull(site, "acme/app", case.image))[0] == 200
    clock.advance(51 * 365 * 86400)
    assert "the signature expired at" in (await pull(site, "acme/app", case.image))[1]


# What is not there


async def test_what_cannot_be_fetched_now_is_no_refusal(serve: Serve, upstream: Upstream) -> None:
    site, case = await one(serve, upstream, "bundle-other-key", signed("ecdsa"))
    upstream.next("GET", "referrers", *[_gone()], times=9)
    status, said = await pull(site, "acme/app", case.image)
    assert status == 502 and "DENIED" not in said


async def test_a_signature_that_is_enough_needs_no_other(serve: Serve, upstream: Upstream) -> None:
    site, case = await one(serve, upstream, "classic-ecdsa", signed("ecdsa"))
    upstream.next("GET", "referrers", *[_gone()], times=9)
    assert (await pull(site, "acme/app", case.image))[0] == 200


def _gone() -> Any:
    from tests.upstream import Status

    return Status(503)


async def test_an_image_that_is_signed_later_is_served_then(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    case = CASES["bundle-ecdsa"]
    site, _ = await one(serve, upstream, "unsigned", signed("ecdsa"))
    assert (await pull(site, "acme/app", "v1"))[0] == 403
    publish(upstream, case, "acme/app")
    clock.advance(3600)
    assert (await pull(site, "acme/app", "v1"))[0] == 200


async def test_an_ambiguous_manifest_is_never_judged_good(serve: Serve, upstream: Upstream) -> None:
    """One reader sees the index that names the image, another one nothing: what does its signature mean?"""
    case = CASES["bundle-ecdsa"]
    publish(upstream, case, "acme/app")
    entry = {"mediaType": case.target.media_type, "digest": case.image, "size": case.target.size}
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry], "Manifests": []}
    upstream.manifest("acme/app", json.dumps(body).encode(), OCI_INDEX, "twice")
    site = await serve(upstream, top=policy(signed("ecdsa")))
    status, said = await pull(site, "acme/app", "twice")
    assert status == 403
    assert "it is no manifest that all clients read alike" in said


# The configuration


def test_the_libraries_that_a_policy_needs_are_imported_once_for_all_processes(tmp_path: Path) -> None:
    def libraries(*rules: dict[str, Any], signers: dict[str, Any]) -> tuple[str, ...]:
        given = {"policy": {"rules": list(rules), "signers": signers}}
        return configuration(tmp_path, given).policy.libraries

    key, keyless = ({name: SIGNERS[name]} for name in ("ecdsa", "keyless"))
    assert libraries(signers={}) == ()
    assert libraries(attested("ecdsa"), signers=key) == ()
    assert libraries(signed("keyless"), signers=keyless) == ("sigstore.verify",)
    both = libraries(attested("keyless", when="true"), signers=keyless)
    assert both == ("sigstore.verify", "cel")
    for name in both:
        assert import_module(name).__name__ == name


@pytest.mark.parametrize(
    ("signer", "says"),
    [
        ({}, "policy.signers.a: give one of key, trusted_root and certificates"),
        ({"key": "/k", "certificates": "/c"}, "give one of key, trusted_root and certificates"),
        ({"key": "/k", "issuer": "x"}, "issuer does not go with key: remove one of them"),
        ({"certificates": "/c", "identity": "x"}, "identity does not go with certificates"),
        (
            {"trusted_root": "/t", "issuer": "x"},
            "identity is missing: without it, whoever",
        ),
        (
            {"trusted_root": "/t", "issuer": "x", "identity": "y", "subject": "O=a"},
            "subject does not go",
        ),
    ],
)
def test_a_signer_is_of_one_kind(tmp_path: Path, signer: dict[str, str], says: str) -> None:
    from proxy.config.errors import ConfigError

    with pytest.raises(ConfigError, match=says):
        configuration(tmp_path, {"policy": {"signers": {"a": signer}}})


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (signed("nobody"), "rule signed names the signer nobody, which is not in signers"),
        (attested("nobody"), "rule attested names the signer nobody"),
        (attested(), "signed_by is empty: name the signers whose statement is believed"),
        ({**signed("ecdsa"), "action": "deny", "reason": "r"}, "rule signed denies, whatever is signed"),
    ],
)
def test_a_rule_names_signers_that_there_are(tmp_path: Path, rule: dict[str, Any], says: str) -> None:
    from proxy.config.errors import ConfigError

    with pytest.raises(ConfigError, match=says):
        configuration(tmp_path, policy(rule))


def test_the_check_of_a_configuration_reads_keys_and_expressions(tmp_path: Path) -> None:
    from proxy.cli.preflight import inspect

    gone = {**SIGNERS, "gone": {"key": str(tmp_path / "gone.pub")}}
    disk = {"disk": {"path": str(tmp_path)}, "listen": "127.0.0.1:0"}
    found = inspect(configuration(tmp_path, {**policy(signed("gone"), signers=gone), **disk}))
    assert [each for each in found.errors if "policy.signers.gone: " in each and "cannot be read" in each]
    found = inspect(configuration(tmp_path, {**policy(attested("ecdsa", when="1 +")), **disk}))
    assert [each for each in found.errors if "`when` is no expression in CEL: Failed to parse" in each]
    assert not inspect(configuration(tmp_path, {**policy(attested("ecdsa", when=BUILDER)), **disk})).errors


async def test_signatures_need_not_be_complete_for_clients_that_need_all_blobs(
    serve: Serve, upstream: Upstream
) -> None:
    """podman and others are refused images of which a blob is missing; no signature's config is fetched."""
    site, case = await one(serve, upstream, "bundle-ecdsa", signed("ecdsa"))
    agent = {"User-Agent": "skopeo/1.18"}
    image = json.loads(content(case.image))
    for kind, reference in (
        ("manifests", "v1"),
        *(("blobs", each["digest"]) for each in (image["config"], *image["layers"])),
    ):
        assert (await site.get(f"/v2/acme/app/{kind}/{reference}", **agent))[0] == 200
    await site.app.stop()
    await upstream.stop()
    site = await serve(upstream, top=policy(signed("ecdsa")))
    for reference in ("v1", case.image):
        assert (await site.get(f"/v2/acme/app/manifests/{reference}", **agent))[0] == 200
