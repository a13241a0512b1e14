"""The keys of records: built and parsed in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import keys
from storage.keys import LINK, MANIFEST, TAG, RecordKind, parse_reference_key
from storage.oci import Digest, Tag
from storage.values import Absence, Link, Pointer, StoredManifest
from tests.test_layers import modules

KINDS = [value for value in vars(keys).values() if isinstance(value, RecordKind)]
NAMES = {kind.name: kind for kind in KINDS}
METHODS = {"get", "put", "delete", "scan", "keys", "first", "groups", "count", "holds"}

fields = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x2FFF), min_size=1)


kinds_and_values = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(fields, min_size=kind.fields, max_size=kind.fields))
)


@given(kinds_and_values)
def test_parse_is_the_inverse_of_key(found: tuple[RecordKind, list[str]]) -> None:
    kind, values = found
    assert kind.parse(kind.key(*values)) == values


@given(fields, fields)
def test_the_last_field_may_hold_spaces(first: str, second: str) -> None:
    assert keys.LISTING.parse(keys.LISTING.key("name", f"{first} {second}")) == ["name", f"{first} {second}"]


@given(kinds_and_values)
def test_a_key_begins_with_each_of_its_prefixes(found: tuple[RecordKind, list[str]]) -> None:
    kind, values = found
    for number in range(kind.fields):
        assert kind.key(*values).startswith(kind.prefix(*values[:number]))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (TAG.key("docker.io/library/alpine", "3"), "tag docker.io/library/alpine 3"),
        (MANIFEST.key("a/b", "sha256:00"), "manifest a/b sha256:00"),
        (LINK.key("a/b", "sha256:00"), "link a/b sha256:00"),
        (LINK.prefix(), "link "),
        (LINK.prefix("a/b"), "link a/b "),
        (LINK.within("a"), "link a/"),
        (keys.REFERRER.key("a/b", "sha256:00", "sha256:11"), "referrers a/b sha256:00 sha256:11"),
        (keys.LISTING.key("a/b", "referrers sha256:00"), "listing a/b referrers sha256:00"),
        (keys.ABSENT.key("17"), "absent 17"),
        (keys.CHANGES.key("a/b"), "pushed a/b"),
        (keys.LEASE.key("a/b", "sha256:00"), "lease a/b sha256:00"),
        (keys.USE.key("a/b", "3"), "use a/b 3"),
        (keys.MOVES.key("a/b", "3"), "moves a/b 3"),
        (keys.STATISTICS.key("hour", "2026010203", "a"), "stats hour 2026010203 a"),
        (keys.PIN.key("a/*:3"), "pin a/*:3"),
        (keys.SCRUB.key("sha256/00"), "scrub sha256/00"),
        (keys.OBJECT.key("sha256:00"), "object sha256:00"),
        (keys.OBJECT.start("sha256:0"), "object sha256:0"),
        (keys.LEFTOVER.key("sha256/00/00.1"), "leftover sha256/00/00.1"),
        (keys.WARMING.key("00"), "warmed 00"),
        (keys.COLLECTED.key(), "collected"),
        (keys.OUTBOX.key("00", "1"), "outbox 00 1"),
        (keys.EVENT.key("hook", "1"), "event hook 1"),
        (keys.PENDING.key("hook"), "pending hook"),
        (keys.WEBHOOK.key("hook"), "webhook hook"),
        (keys.NUMBER.key(), "number"),
    ],
)
def test_keys_stay_what_they_are_on_disk(key: str, expected: str) -> None:
    assert key == expected


def test_a_damaged_key_has_empty_fields() -> None:
    assert MANIFEST.parse("manifest a/b") == ["a/b", ""]
    assert keys.REFERRER.parse("referrers ") == ["", "", ""]


def test_a_key_of_too_few_fields_is_refused() -> None:
    with pytest.raises(TypeError, match="a key of 'link' has 2 fields, not 1"):
        LINK.key("a/b")


def test_references() -> None:
    digest = Digest.of(b"")
    assert parse_reference_key(TAG.key("a/b", "3")) == ("a/b", Tag("3"))
    assert parse_reference_key(MANIFEST.key("a/b", digest)) == ("a/b", digest)
    assert isinstance(parse_reference_key(MANIFEST.key("a/b", digest))[1], Digest)


# Values

times = st.floats(0, 2**40)
media_types = st.text(st.characters(codec="ascii", exclude_characters="\n"))
digests = st.binary(max_size=2).flatmap(
    lambda content: st.sampled_from([Digest.of(content), Digest.of(content, "sha512")])
)


@given(
    st.one_of(
        st.builds(Pointer, digests, times),
        st.builds(
            StoredManifest, st.text(st.characters(codec="ascii", exclude_characters="\n")), times, st.binary()
        ),
        st.builds(Link, st.integers(0), times),
        st.builds(
            Absence,
            times,
            st.just("NAME_UNKNOWN"),
            st.sampled_from(["a/b", "up/a"]),
            st.text("ab :/", min_size=1),
        ),
    )
)
def test_parse_is_the_inverse_of_encode(value: Pointer | StoredManifest | Link | Absence) -> None:
    assert type(value).parse(value.encode()) == value


@pytest.mark.parametrize("kind", [Pointer, StoredManifest, Link, Absence])
@given(record=st.binary() | st.none())
def test_a_damaged_value_is_none(
    kind: type[Pointer | StoredManifest | Link | Absence], record: bytes | None
) -> None:
    found = kind.parse(record)
    assert found is None or kind.parse(found.encode()) == found


@pytest.mark.parametrize(
    "record", [None, b"", b"1", b"1 nan", b"1 inf", b"-1 1", b"x 1", b"sha256:00 1", b"1 x"]
)
@pytest.mark.parametrize("kind", [Pointer, Link])
def test_what_is_no_value_is_none(kind: type[Pointer | Link], record: bytes | None) -> None:
    assert kind.parse(record) is None


# No other module spells a key


def spelled(source: str) -> Iterator[str]:
    """The expressions in `source` that build a key or take one apart."""
    nodes = list(ast.walk(ast.parse(source)))
    pieces = {each for node in nodes if isinstance(node, ast.JoinedStr) for each in node.values}
    for node in nodes:
        if node in pieces:
            continue
        if isinstance(node, ast.JoinedStr | ast.Constant) and _is_key(_text(node)):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = ast.unparse(node.func.value), node.func.attr
            takes_apart = method in ("split", "rsplit", "partition", "rpartition", "removeprefix")
            if takes_apart and owner.rpartition(".")[2] == "key" and _separator(node):
                yield ast.unparse(node)
            if method in METHODS and owner.rpartition(".")[2].strip("_") in ("records", "batch"):
                yield from (ast.unparse(each) for each in node.args[:1] if _text(each) is not None)


def _separator(call: ast.Call) -> bool:
    return not call.args or " " in (_text(call.args[0]) or " ")


def _text(node: ast.AST) -> str | None:
    """What a string says, `{}` for what is put into it; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is_key(text: str | None) -> bool:
    name, _, rest = (text or "").partition(" ")
    if name not in NAMES or not rest.startswith("{}"):
        return text is not None and text.endswith(" ") and text[:-1] in NAMES
    return set(rest) <= set("{} /") and (rest.endswith((" ", "/")) or rest.count("{}") == NAMES[name].fields)


def test_no_other_module_spells_a_key() -> None:
    found = {
        module: list(spelled(source)) for module, source in modules().items() if module != "storage.keys"
    }
    assert {module: expressions for module, expressions in found.items() if expressions} == {}


@pytest.mark.parametrize(
    "source",
    [
        'f"tag {repository} {tag}"',
        'f"link {name}/"',
        'f"referrers {repository} {subject} "',
        '"link "',
        'key.split(" ")',
        'key.removeprefix("pin ")',
        'key.rpartition(" ")[2]',
        'self._records.get("collected")',
        'batch.put(f"x{name}", b"")',
    ],
)
def test_a_key_that_is_spelled_is_found(source: str) -> None:
    assert list(spelled(source))


@pytest.mark.parametrize(
    "source",
    [
        'f"tag {tag} of {name} is immutable"',
        'f"referrers {digest}"',
        'f"manifest {reference}"',
        'header.partition(" ")',
        "batch.get(TAG.key(name, tag))",
        'found.get("tag")',
    ],
)
def test_other_text_is_no_key(source: str) -> None:
    assert not list(spelled(source))
