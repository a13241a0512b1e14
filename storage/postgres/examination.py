"""What a database is like that is to hold records; nothing in it is changed."""

from __future__ import annotations

import time
from contextlib import closing
from typing import NamedTuple

import psycopg

from storage.errors import StorageUnavailable
from storage.postgres.connections import Connections
from storage.postgres.schema import VERSION, version_of

_ASKED = """
SELECT current_setting('server_version_num')::integer / 10000, current_setting('server_version'),
    current_setting('max_connections')::integer, current_setting('fsync') = 'on',
    current_setting('full_page_writes') = 'on', extract(epoch FROM clock_timestamp())::float8,
    coalesce(
        has_schema_privilege(current_schema(), 'CREATE'),
        has_database_privilege(current_database(), 'CREATE')
    )
"""


class Examination(NamedTuple):
    """What was found.

    schema: the version of the tables, 0 if there are none; `known` is the one that this program needs
    durable: whether what is committed survives a power failure
    ahead: by how many seconds its clock is ahead of ours
    creates: whether tables can be made
    """

    name: str
    major: int
    version: str
    schema: int
    known: int
    connections: int
    durable: bool
    ahead: float
    creates: bool


def examine(url: str, part: str = "") -> Examination:
    """Ask the database at `url` about a `part` of the records.  Blocks.

    Raises StorageUnavailable, and StorageFailed for a bad URL.
    """
    connections = Connections(url, 1, part)
    try:
        with closing(connections.connect()) as connection:
            asked_at = time.time()
            row = connection.execute(_ASKED).fetchone()
            answered_at = time.time()
            assert row is not None
            major, version, most, synced, whole, at, creates = row
            schema = version_of(connection)
    except psycopg.Error as error:
        raise StorageUnavailable(str(error).partition("\n")[0]) from error
    ahead = at - (asked_at + answered_at) / 2
    return Examination(
        connections.name, major, version, schema, VERSION, most, synced and whole, ahead, bool(creates)
    )
