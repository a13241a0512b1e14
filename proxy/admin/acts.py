"""What operators did that all replicas of a fleet are to do: pins, purges, exceptions, decisions, drills.

    act <subject>             JSON of a FleetAct

Each replica keeps the last act about each subject, and does it when it learns of it: from the replica that
was asked, at once; from any other one, if it was down then.  A later act replaces an earlier one, so replicas
that know the same acts have done the same, whatever the order in which they learned of them.  Of two acts at
the same time, as replicas make them whose clocks are behind that of a third, all take the same one for the
later.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import structlog

from proxy.admin.operations import OPERATIONS, Operation, Operations, perform
from proxy.config.image_names import split
from proxy.namespaces.references import ReferenceReader
from proxy.upstream.replicas import UNKNOWN
from storage.concurrency import run_in_thread
from storage.errors import Denied, RegistryError, StorageFailed, Unavailable
from storage.keys import ACT
from storage.records import Records

log = structlog.get_logger()

KEPT = 90 * 86400.0  # seconds for which acts are kept, but those that set a pin
STEP = 0.001  # seconds between an act and a later one about the same subject, at least


class FleetAct(msgspec.Struct, frozen=True):
    """An operation with its arguments, done `at` a time in seconds since the epoch, about a subject."""

    subject: str
    at: float
    operation: str
    arguments: dict[str, Any]

    @property
    def order(self) -> tuple[float, str, bytes]:
        """Is greater for a later act about the same subject, and equal only for the same act."""
        return self.at, self.operation, msgspec.json.encode(self.arguments, order="sorted")


class Acts:
    """The acts that a replica knows.  Methods block, and raise StorageFailed."""

    def __init__(self, records: Records, clock: Callable[[], float]) -> None:
        self._records = records
        self._clock = clock

    def all(self) -> list[FleetAct]:
        """The oldest first; those that need not be known any more are forgotten."""
        found, now = [], self._clock()
        for _, value in list(self._records.scan(ACT.prefix())):
            if (act := _parse(value)) is None:
                continue
            if self.is_over(act, now):
                self._records.delete(ACT.key(act.subject))
            else:
                found.append(act)
        return sorted(found, key=lambda each: (each.at, each.subject))

    @staticmethod
    def is_over(act: FleetAct, now: float) -> bool:
        """Whether no replica has to learn of it any more."""
        return act.operation != "pin" and now - act.at >= KEPT

    def last(self, subject: str) -> FleetAct | None:
        return _parse(self._records.get(ACT.key(subject)))

    def keep(self, act: FleetAct) -> None:
        self._records.put(ACT.key(act.subject), msgspec.json.encode(act))


def _parse(record: bytes | None) -> FleetAct | None:
    """None if it is absent or damaged."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(record or b"", type=FleetAct)
    return None


def digest_of(acts: Iterable[FleetAct]) -> str:
    """Is the same for replicas that know the same acts."""
    return hashlib.sha256(msgspec.json.encode([(each.subject, each.order) for each in acts])).hexdigest()


class TooLate(Denied):
    """A later act about the same subject was done, or the time of the act has passed."""


class ActControl:
    """Does acts at this replica, one after the other.  `done` is called after each that another one told."""

    def __init__(
        self,
        acts: Acts,
        own: Operations,
        reader: ReferenceReader,
        clock: Callable[[], float],
        done: Callable[[], None],
    ) -> None:
        self._acts = acts
        self._own = own
        self._reader = reader
        self._clock = clock
        self._done = done
        self._turn = asyncio.Lock()

    async def begin(self, operation: Operation, arguments: Mapping[str, Any]) -> tuple[FleetAct, Any]:
        """Do and keep what an operator asks of this replica; the act, and its result.

        The result is a RegistryError if there is nothing here to do it to: another replica may have it.
        Raises RegistryError, FieldInvalid.
        """
        subject = self._subject(operation, arguments)
        async with self._turn:
            last = await run_in_thread(self._acts.last, subject)
            at = max(self._clock(), last.at + STEP if last else 0.0)  # whatever the clock of another replica
            act = FleetAct(subject, at, operation.name, dict(arguments))
            return act, await self._do(act, arguments)

    async def _do(self, act: FleetAct, arguments: Mapping[str, Any]) -> Any:
        """Do an act now, and keep it: also if there is nothing here to do it to, as an earlier one may come.

        The result is then a RegistryError.  Raises other RegistryErrors, FieldInvalid.
        """
        try:
            result = await perform(self._own, OPERATIONS[act.operation], arguments)
        except RegistryError as error:
            if error.code not in UNKNOWN:
                raise
            result = error
        await run_in_thread(self._acts.keep, act)
        return result

    def _subject(self, operation: Operation, arguments: Mapping[str, Any]) -> str:
        """Raises FieldInvalid."""
        if (text := arguments.get("pattern")) is not None:
            return f"{operation.kept} {self._reader.pattern('pattern', text).pattern}"
        if (text := arguments.get("reference")) is not None:
            image = self._reader.reference("reference", text)
            return f"{operation.kept} {image.repository}{text[len(split(text)[0]) :] or ':latest'}"
        return f"{operation.kept} all"

    async def follow(self, act: FleetAct) -> Any:
        """Do and keep an act of which another replica tells; its result.

        Raises RegistryError, FieldInvalid; one of UNKNOWN and TooLate also after it was kept.
        """
        async with self._turn:
            last, now = await run_in_thread(self._acts.last, act.subject), self._clock()
            if last is not None and last.order > act.order:
                raise TooLate(f"it has done a later {last.operation}")
            if (arguments := self._left(act, now)) is None:
                await run_in_thread(self._acts.keep, act)
                raise TooLate("by its clock, the time is over")
            result = await self._do(act, arguments)
        if isinstance(result, RegistryError):
            raise result
        self._done()
        return result

    @staticmethod
    def _left(act: FleetAct, now: float) -> dict[str, Any] | None:
        """The arguments of an act that is done now; None if its time has passed."""
        arguments: dict[str, Any] = msgspec.structs.asdict(
            msgspec.convert(act.arguments, OPERATIONS[act.operation].parameters)
        )
        if (seconds := arguments.get("seconds")) is not None:
            arguments["seconds"] = seconds - max(0.0, now - act.at)
            if arguments["seconds"] <= 0:
                return None
        return arguments

    async def learn(self, acts: Iterable[FleetAct]) -> None:
        """Do those acts of other replicas that are not known here.  Raises StorageFailed."""
        for act in sorted(acts, key=lambda each: each.order):
            operation = OPERATIONS.get(act.operation)
            if operation is None or operation.kept is None or self._acts.is_over(act, self._clock()):
                continue  # of a replica of another version, or with another clock
            last = await run_in_thread(self._acts.last, act.subject)
            if last is not None and last.order >= act.order:
                continue
            try:
                await self.follow(act)
            except (StorageFailed, Unavailable):
                raise
            except TooLate:
                continue
            except (RegistryError, ValueError) as error:  # there is nothing here to do it to
                await run_in_thread(self._acts.keep, act)
                log.info("act.void", operation=act.operation, subject=act.subject, reason=str(error))
                continue
            log.info("act.learned", operation=act.operation, subject=act.subject)

    async def known(self) -> list[FleetAct]:
        return await run_in_thread(self._acts.all)
