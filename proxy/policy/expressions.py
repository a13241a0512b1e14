"""Expressions over attestations, in the Common Expression Language (CEL): cel.dev/spec, langdef.md.

The library of that name evaluates them; it is imported only where there is an expression.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from proxy.config.errors import StartError
from proxy.signatures.errors import printable

SHOWN = 200  # characters of an error of the library

VARIABLES = ("predicate", "now", "image", "digest")

_BOUND = re.compile(r"\(\s*(\w+)\s*,")  # the x of `.exists(x, …)`
_NAMESPACE = "optional"  # of `optional.of(…)`: neither a variable nor a value


class Expression:
    """An expression that is true or not of an attestation.

    predicate: what the statement says
    now: the time
    image, digest: the full name of the repository, and the digest of the manifest that is judged

    Raises StartError for one that cannot be evaluated.
    """

    def __init__(self, text: str) -> None:
        try:
            import cel
        except ImportError:
            raise StartError(
                "`when` needs the library common-expression-language: install entrepot[policy]"
            ) from None
        try:
            self._program = cel.compile(text)
        except ValueError as error:
            raise StartError(f"`when` is no expression in CEL: {printable(str(error), SHOWN)}") from None
        known = {*VARIABLES, _NAMESPACE, *_BOUND.findall(text)}
        for name in self._program.variables():  # the library finds a wrong one only when it is evaluated
            if name not in known and not _is_value(name):
                raise StartError(f"`when` knows no {name!r}, but {', '.join(VARIABLES)}")
        self.text = text
        # Whether it may be true now and false later.
        self.depends_on_time = "now" in self._program.variables()

    def holds(self, predicate: Any, now: float, image: str, digest: str) -> bool:
        """Whether it is true.  Raises ExpressionFailed if it has no such value."""
        given = dict(
            zip(VARIABLES, (predicate, datetime.fromtimestamp(now, UTC), image, digest), strict=True)
        )
        try:
            value = self._program.execute(given)
        except Exception as error:  # the library raises what fits: KeyError, TypeError, RuntimeError …
            raise ExpressionFailed(f"{type(error).__name__}: {printable(str(error), SHOWN)}") from None
        if not isinstance(value, bool):
            raise ExpressionFailed(f"its value is {type(value).__name__}, not true or false")
        return value


def _is_value(name: str) -> bool:
    """Whether CEL itself has a value of this name, as for a type: `int`."""
    import cel

    try:
        cel.compile(name).execute({})
    except Exception:  # as in Expression.holds
        return False
    return True


class ExpressionFailed(Exception):
    """An expression has no value for an attestation, as if a member is missing.  The text says why."""
