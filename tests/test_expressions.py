"""Tests of proxy/policy/expressions.py."""

import re

import pytest

from proxy.config.errors import StartError
from proxy.policy.expressions import Expression

DIGEST = "sha256:" + "ab" * 32
PREDICATE = {"list": [{"a": 1}, {"b": 2}], "count": 3}


@pytest.mark.parametrize(
    "text",
    [
        "predicat.count == 3",
        "predicate.count == 3 || tag == 'v1'",  # seen although it need not be evaluated
        "type(predicate.count) == integer",
        "predicate.list.exists(x, y.a == 1)",
        "google.protobuf.Timestamp == type(now)",
    ],
)
def test_variables_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(StartError, match=re.escape("`when` knows no '")):
        Expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "predicate.count == 3 && image == 'a/b' && digest.startsWith('sha256:')",
        "now > timestamp('1970-01-01T00:00:00Z')",
        "predicate.list.exists( x , has(x.b) && x.b == 2)",
        "predicate.list.map(x, has(x.a), x.a).all(y, y == 1)",
        "type(predicate.count) == int && type(predicate) == map",
        "optional.of(predicate).hasValue()",
    ],
)
def test_variables_of_the_expression_itself_and_types_are_known(text: str) -> None:
    assert Expression(text).holds(PREDICATE, 1e9, "a/b", DIGEST)
