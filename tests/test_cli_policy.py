"""policy check, test and explain, and which rules can never decide."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import main
from proxy.config.policy import parse_tags
from proxy.policy.coverage import covers, unreachable
from tests.configuring import read
from tests.conftest import Serve, Site
from tests.signing.cases import DATA
from tests.test_admin import conforms
from tests.test_policed import LATEST, LISTED, policy, status
from tests.upstream import Upstream


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["policy", *words])


# Which rules are reached


@pytest.mark.parametrize(
    ("pattern", "other", "covered"),
    [
        ("*", "v*", True),
        ("v*", "v1.*", True),
        ("v*", "v", True),
        ("v?", "v1", True),
        ("v?", "v*", False),
        ("v*", "*", False),
        ("*1*", "v1?", True),
        ("*.?", "v*.1", True),
        ("??*", "?*", False),
        ("v*", "re:v.*", False),
        ("re:v.*", "v1", True),
        ("re:v.*", "v*", False),
        ("re:v.*", "re:v.*", True),
        ("v[12]", "v1", True),
        ("v[12]", "v3", False),
        ("*", "v[12]", False),  # it cannot be told
        ("a.b", "axb", False),
    ],
)
def test_which_pattern_covers_another(pattern: str, other: str, covered: bool) -> None:
    assert covers(parse_tags(pattern), parse_tags(other)) is covered


def test_rules_that_never_decide() -> None:
    rules = """
- {name: a, action: allow, repositories: ["docker.io/library/*"], tags: ["v*", "re:[0-9]+"]}
- {name: b, action: deny, repositories: ["docker.io/library/alpine"], tags: ["v1"], reason: x}
- {name: c, action: deny, repositories: ["docker.io/library/alpine"], reason: x}
- {name: d, action: deny, repositories: ["docker.io/*"], tags: ["v1"], reason: x}
- {name: e, action: deny, reason: x}
- {name: f, action: allow}
"""
    found = unreachable(read(f"policy:\n  rules: {rules.replace(chr(10), chr(10) + '  ')}").policy.rules)
    assert [(rule.name, before.name) for rule, before in found] == [("b", "a"), ("f", "e")]


SIGNED = {
    "signers": {"release": {"key": "/nowhere/release.pub"}},
    "rules": [
        {"name": "ours", "action": "allow", "repositories": ["docker.io/acme/*"], "signed_by": ["release"]},
        {
            "name": "built",
            "action": "allow",
            "repositories": ["docker.io/built/*"],
            "attested": [{"type": "t", "signed_by": ["release"], "when": "has(predicate.a)"}],
        },
    ],
}


def test_names_are_judged_where_the_files_of_signers_are_not(tmp_path: Path) -> None:
    file, cases = tmp_path / "new.yml", tmp_path / "cases.yml"
    file.write_text(json.dumps({"policy": SIGNED}))
    assert run("check", str(file)).exit_code == 0
    cases.write_text(
        "[{image: acme/app, expect: verify, rule: ours}, {image: built/app, expect: verify},"
        " {image: other/app, expect: allow}]"
    )
    assert run("test", str(cases), "--config", str(file)).exit_code == 0
    broken = json.dumps({"policy": SIGNED}).replace("has(predicate.a)", "has(predicate.a")
    file.write_text(broken)
    result = run("check", str(file))
    assert result.exit_code == 1
    assert "rule built: `when` is no expression in CEL: Failed to parse" in result.stderr


def test_check(tmp_path: Path) -> None:
    file = tmp_path / "new.yml"
    file.write_text(json.dumps(policy(LATEST)))
    result = run("check", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file} is valid: 1 rule\n")
    file.write_text(json.dumps(policy(LATEST, {**LATEST, "name": "again", "tags": ["latest"]})))
    result = run("check", str(file))
    assert result.exit_code == 1
    assert "rule again never decides: moving, before it, matches all that it matches" in result.stderr
    file.write_text(json.dumps(policy({**LATEST, "action": "block"})))
    result = run("check", str(file))
    assert result.exit_code == 2
    assert "policy.rules[0].action: expected one of allow, deny" in result.stderr


def test_the_check_of_a_configuration_warns_of_it(tmp_path: Path) -> None:
    file = tmp_path / "entrepot.yml"
    tree = policy(LATEST, {**LATEST, "name": "again"})
    file.write_text(json.dumps({**tree, "disk": {"path": str(tmp_path / "disk")}}))
    result = CliRunner().invoke(main, ["check", str(file)])
    said = "warning: policy rule again never decides: moving matches all that it does"
    assert said in result.output


# Cases


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "entrepot.yml"
    tree = {**policy({**LATEST, "repositories": ["docker.io/*", "local/*"]}, allow_list=["ghcr.io/*"])}
    namespaces = {"docker.io": {"upstream": "http://127.0.0.1:9"}, "local": {"store": {}}}
    path.write_text(json.dumps({**tree, "namespaces": namespaces}))
    return path


def verdicts(tmp_path: Path, config: Path, cases: Any, *words: str) -> Result:
    path = tmp_path / "cases.yml"
    path.write_text(cases if isinstance(cases, str) else json.dumps(cases))
    return run("test", str(path), "--config", str(config), *words)


def test_cases_that_pass(tmp_path: Path, config: Path) -> None:
    cases = """
- {image: alpine, expect: deny, rule: moving}
- {image: "alpine:3", expect: allow}
- {image: "local/app:latest", expect: deny}
- {image: "ghcr.io/x/y:1", expect: deny, rule: allow_list}
- {image: "docker.io/library/alpine:latest@sha256:%s", expect: allow}
""" % ("0" * 64)
    result = verdicts(tmp_path, config, cases, "--wide")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "all 5 passed"
    assert "docker.io/library/alpine:latest " in result.stdout


def test_cases_that_fail(tmp_path: Path, config: Path) -> None:
    cases = [
        {"image": "alpine", "expect": "allow"},
        {"image": "alpine", "expect": "deny", "rule": "other"},
        {"image": "alpine:3", "expect": "allow"},
    ]
    result = verdicts(tmp_path, config, cases, "--json")
    assert result.exit_code == 1
    found = [(each["passed"], each["found"], each["rule"]) for each in json.loads(result.stdout)]
    assert found == [(False, "deny", "moving"), (False, "deny", "moving"), (True, "allow", "")]
    assert "2 of 3 failed" in verdicts(tmp_path, config, cases).stdout


@pytest.mark.parametrize(
    ("cases", "says"),
    [
        ("{", "is not YAML"),
        ([{"image": "alpine"}], "missing required field `expect`"),
        ([{"image": "alpine", "expect": "maybe"}], "Invalid enum value 'maybe'"),
        ([{"image": "alpine", "expect": "deny", "rules": "x"}], "unknown field `rules`"),
        ([{"image": "UPPER", "expect": "deny"}], "is not an image name"),
    ],
)
def test_what_is_no_case(tmp_path: Path, config: Path, cases: Any, says: str) -> None:
    result = verdicts(tmp_path, config, cases)
    assert result.exit_code == 2
    assert says in result.stderr


# Explanations


async def explained(site: Site, reference: str, by: str = "policy") -> Any:
    path = f"/api/v1/{by}?ref={reference}"
    async with site.session.get(f"{site.app.admin_url}".rstrip("/") + path) as response:
        found = await response.json()
        assert response.status == 200, found
    conforms("GET", path, 200, found)
    return found


async def test_an_explanation_says_what_leads_to_it(serve: Serve, upstream: Upstream) -> None:
    child = upstream.image("a/b", None, [b"child"])
    index = upstream.index("a/b", "v1", [child])
    upstream.repositories["a/b"].tags["edge"] = index.digest
    site = await serve(upstream, top={"policy": LISTED})
    found = await explained(site, "a/b:edge")
    assert (found["allowed"], found["rule"], found["digest"], found["leads"]) == (
        False,
        "allow_list",
        None,
        [],
    )
    assert await status(site, "v1") == 200
    found = await explained(site, f"a/b@{child.digest}")
    assert (found["allowed"], found["rule"], found["mode"]) == (True, "releases", "enforce")
    assert [(each["digest"], each["tag"], each["allowed"]) for each in found["leads"]] == [
        (index.digest, "v1", True)
    ]
    words = "policy", "explain", f"a/b@{child.digest}", "--server", str(site.app.admin_url), "--wide"
    result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert result.exit_code == 0, result.output
    assert "verdict  allowed" in result.stdout
    assert f"{index.digest}  v1   releases" in result.stdout


async def test_without_a_policy_that_is_the_explanation(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    found = await explained(site, "a/b:1")
    assert (found["allowed"], found["reason"]) == (True, "the configuration has no policy")


async def test_why_names_the_rule_that_decides(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    rules = [
        {**LATEST, "repositories": ["docker.io/a/b"]},
        {**LATEST, "name": "tried", "repositories": ["docker.io/a/*"], "tags": ["edge"], "mode": "warn"},
        {"name": "none", "action": "deny", "repositories": ["docker.io/evil/*"], "reason": "it is evil"},
        {"name": "locked", "action": "allow", "repositories": ["docker.io/locked/*"], "signed_by": ["key"]},
    ]
    signers = {"key": {"key": str(DATA / "ecdsa.pub")}}
    site = await serve(upstream, top=policy(*rules, signers=signers))

    async def verdict(reference: str) -> tuple[str, Any]:
        found = await explained(site, reference, by="why")
        return found["verdict"], found["policy"] and (found["policy"]["rule"], found["policy"]["verdict"])

    assert await verdict("a/b:latest") == ("refused", ("moving", "deny"))
    assert await verdict("a/b:1") == ("miss", ("", "allow"))
    assert await verdict("a/b:edge") == ("miss", ("tried", "deny"))
    assert await verdict("locked/x:1") == ("miss", ("locked", "verify"))
    assert await verdict(f"evil/x@{image.digest}") == ("refused", ("none", "deny"))
    assert await verdict(f"a/b@{image.digest}") == ("miss", None)  # the tags that lead to it decide

    async def said(*words: str) -> str:
        given = [*words, "--server", str(site.app.admin_url), "--wide"]
        result = await asyncio.to_thread(CliRunner().invoke, main, given)
        assert result.exit_code == 0, result.output
        return result.stdout

    told = await said("why", "a/b:latest")
    assert "refused: policy rule moving refuses it: latest moves" in told
    assert "moving, which refuses it in mode enforce: latest moves" in told
    await said("policy", "override", "a/b:latest", "--for", "1h", "--reason", "hotfix")
    assert await verdict("a/b:latest") == ("miss", ("moving", "allow"))


async def test_why_names_no_rule_without_a_policy(serve: Serve, upstream: Upstream) -> None:
    assert (await explained(await serve(upstream), "a/b:1", by="why"))["policy"] is None
