"""What the doctor says of the issuers of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.doctor import issuers
from proxy.doctor.checks import Check
from tests.conftest import configuration
from tests.issuer import METADATA, Issuer


async def examine(
    directory: Path, issuer: Issuer, clock: Callable[[], float] = time.time, **keys: Any
) -> list[Check]:
    entry = {"issuer": issuer.url, "audience": "x", "required_claims": {"sub": "x"}, **keys}
    config = configuration(directory, {"disk": {"path": str(directory)}, "access": {"oidc": {"ci": entry}}})
    return await issuers.check(config.access.oidc, clock)


async def test_all_is_well(tmp_path: Path, issuer: Issuer) -> None:
    (found,) = await examine(tmp_path, issuer)
    assert (found.state, found.subject, found.message) == ("ok", "ci", "its keys can be had: first")


@pytest.mark.parametrize(
    ("ahead", "says"), [(100.0, "behind this machine's"), (-100.0, "ahead of this machine's")]
)
async def test_clocks(tmp_path: Path, issuer: Issuer, ahead: float, says: str) -> None:
    _, found = await examine(tmp_path, issuer, lambda: time.time() + ahead)
    assert (found.name, found.state) == ("clock", "warning")
    assert says in found.message


async def test_what_is_wrong(tmp_path: Path, issuer: Issuer) -> None:
    issuer.answers[METADATA] = 404, {}, b""
    (found,) = await examine(tmp_path, issuer)
    assert found.state == "failed"
    assert (
        found.message == f"{issuer.url}{METADATA}: the issuer ci answered 404 to GET {issuer.url}{METADATA}"
    )
    assert "access.oidc.ci" in found.advice
    (found,) = await examine(tmp_path, issuer, ca_file=str(tmp_path / "absent"))
    assert (found.state, "ca_file" in found.message) == ("failed", True)
    await issuer.stop()
    (found,) = await examine(tmp_path, issuer)
    assert "nothing listens there" in found.message
