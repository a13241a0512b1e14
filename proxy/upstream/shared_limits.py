"""What the replicas of a fleet tell each other of an upstream: open circuits, and budgets of requests.

It is in a header of the requests between them, and of the responses.  Names of upstreams and accounts are
hashed with the secret of the fleet.  Times are ages, so that clocks need not agree.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

import msgspec

from proxy.upstream.breaker import Breaker, Opening
from proxy.upstream.ratelimit import Budget, Spent


class SharedLimits(msgspec.Struct, array_like=True, frozen=True):
    """The open circuits of upstreams, and the budgets of their accounts, by the name that Namer gives."""

    circuits: dict[str, Opening] = {}
    budgets: dict[str, Spent] = {}

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> SharedLimits:
        """That of a header; empty if it is malformed."""
        try:
            return _decoder.decode(text.encode("utf-8", "replace"))
        except (msgspec.DecodeError, RecursionError):
            return cls()


_decoder = msgspec.json.Decoder(SharedLimits)


class Namer:
    """Names things by hashes that only those with the same secret can make."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def name(self, *parts: object) -> str:
        return hmac.digest(self._key, repr(parts).encode(), hashlib.sha256).hex()[:16]


class KnownUpstream:
    """What is known of one upstream at `url`.

    budgets: those of its credentials, each with its account, which is empty for none
    learned: is called with the number of a budget of which another replica has told
    """

    def __init__(
        self,
        url: str,
        breaker: Breaker,
        budgets: Sequence[tuple[str, Budget]],
        learned: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._learned = learned
        self._url = url
        self._breaker = breaker
        self._budgets = [(number, account, each) for number, (account, each) in enumerate(budgets)]

    def tell(self, namer: Namer) -> SharedLimits:
        opened = self._breaker.opened()
        spent = {
            namer.name(self._url, number, account): each.spent() for number, account, each in self._budgets
        }
        return SharedLimits(
            {} if opened is None else {namer.name(self._url): opened},
            {name: each for name, each in spent.items() if each is not None},
        )

    def learn(self, told: SharedLimits, namer: Namer) -> None:
        """Have it known here, unless what is known here is newer."""
        if (opened := told.circuits.get(namer.name(self._url))) is not None:
            self._breaker.learn(opened)
        for number, account, budget in self._budgets:
            if (spent := told.budgets.get(namer.name(self._url, number, account))) is not None:
                # Without an account an upstream counts by address, and that of another replica may differ.
                budget.learn(spent, blocks=bool(account))
                self._learned(number)
