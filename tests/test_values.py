"""Other values of the configuration."""

from __future__ import annotations

import pytest

from tests.configuring import (
    at,
    fault,
    namespace,
    read,
)


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999999999999}", "re:*"])
def test_a_bad_pattern_is_named(pattern: str) -> None:
    line = fault(namespace(f"tags: [{{match: '*', fresh_for: 1s}}, {{match: '{pattern}', fresh_for: 1s}}]"))
    assert line.startswith("namespaces.x.tags[1].match: is not a valid regular expression")


@pytest.mark.parametrize("helper", ["../sh", "a b", "a/b"])
def test_credential_helper_refused(helper: str) -> None:
    assert fault(at(f"credential_helper: '{helper}'")).startswith("namespaces.x.upstream.credential_helper: ")


def test_secrets_do_not_show() -> None:
    config = read(at("username: u, password: hunter2, proxy: 'http://u:hunter2@proxy:1'"))
    assert config.namespaces["x"].upstream.password == "hunter2"
    assert "hunter2" not in repr(config) + str(config) + f"{config}"
    assert "'***'" in repr(config)
