"""The preconditions of a request: RFC 9110 §13.1.  The entity tag of content is its digest in quotes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from storage.errors import PreconditionFailed
from storage.oci import Digest

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Conditions:
    """The members of If-Match and If-None-Match; None is a header that was not sent.

    The quotes of an entity tag may be missing.  What is no entity tag matches nothing.
    """

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return self != ALWAYS

    def failed(self, digest: Digest | None) -> str:
        """The first header, in the order of §13.2.2, that is false; "" if none is.

        `digest` is that of the content which is there, None if there is none.
        """
        ours = set() if digest is None else {f'"{digest}"', str(digest)}
        if self.match is not None and self.match.isdisjoint(ours) and not (ours and self.match == {"*"}):
            return "If-Match"  # by strong comparison
        others = {each.removeprefix("W/") for each in self.none_match or ()}
        return "If-None-Match" if ours and not others.isdisjoint(ours | {"*"}) else ""

    def check(self, digest: Digest | None) -> None:
        """Raise PreconditionFailed if one is false."""
        if header := self.failed(digest):
            raise PreconditionFailed(
                f"{header} is false of what is stored now: get that first, then try again"
            )

    def after(
        self, allowed: Callable[P, None] | None, current: Callable[[], Digest | None]
    ) -> Callable[P, None]:
        """Calls `allowed`, and then check() with what is `current`: other errors come first, §13.2.1."""

        def check(*arguments: P.args, **named: P.kwargs) -> None:
            if allowed is not None:
                allowed(*arguments, **named)
            if self:
                self.check(current())

        return check


ALWAYS = Conditions()
