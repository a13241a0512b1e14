"""Rounds of random writes to a private registry that is moved to and fro meanwhile: see writes.py."""

from __future__ import annotations

from functools import partial

from storage.migration.move import Engine, EngineMove, complete
from storage.records import Records
from storage.writers import FILES, OBJECTS, GuardedRecords, Writers
from tests.bench.expected import FailingPostgres, FailingRecords
from tests.bench.image_writes import Server
from tests.bench.rounds import Operation, Rounds

MOVING = ("moved, same records", "moved, two servers", "moved, PostgreSQL")
MOVED = 0.25  # the share of the rounds in which it is moved


class MovingRounds(Rounds):
    """Rounds on a registry that is moved between the files of one server and a bucket.

    With the bucket its records are the same, or other ones, which two servers have in common.  What fails may
    be a step of a move, which the next move resumes.  Servers use the engines in which the registry is.
    """

    def _open(self, kind: str, database: str) -> None:
        made = partial(FailingRecords, clock=self.clock, failures=self.failures)
        here: Records = made(self._place / "records", remote=False)
        there = here
        if database:
            there = FailingPostgres(database, self.clock, self.failures)
        elif kind == "moved, two servers":
            there = made(self._place / "there", remote=True)
        self._all: dict[str, list[Server]] = {FILES: [], OBJECTS: []}
        self._engines: dict[str, Engine] = {}
        names = {FILES: ["one"], OBJECTS: ["two", "three"][: 1 + (there is not here)]}
        for where, records in {FILES: here, OBJECTS: there}.items():
            content = self._content("one" if where == FILES else "moves", records, where == FILES)
            self._engines[where] = Engine(records, content, where)
            for name in names[where]:
                guarded = GuardedRecords(records, where, self.clock)
                content = self._content(name, guarded, where == FILES)
                self._all[where].append(self._server(content, guarded))
        self._use(FILES)

    def _use(self, where: str) -> None:
        self._where, self._in_files = where, where == FILES
        self._servers, self._records = self._all[where], self._engines[where].records

    def _chosen(self) -> list[Operation]:
        return super()._chosen() + [self.move] * (self._random.random() < MOVED)

    async def move(self, server: Server, repository: str) -> None:
        other = OBJECTS if self._in_files else FILES
        report = await EngineMove(self._engines[self._where], self._engines[other], self.clock).run()
        self.expected.wrong += [f"damaged: {each}" for each in report.damaged.values()]

    def _settle(self) -> None:
        """Complete a move, as a server does that is started after it."""
        here, there = (self._engines[where].records for where in (FILES, OBJECTS))
        if there is not here:
            complete(here, there, OBJECTS)
            complete(there, here, FILES)
        for where, engine in self._engines.items():
            if (found := Writers.of(engine.records)) is not None and found.content == where:
                self._use(where)

    async def end(self) -> None:
        await super().end()
        for where, servers in self._all.items():
            for each in servers if where != self._where else ():
                await each.store.close()
