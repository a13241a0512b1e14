"""The tables in PostgreSQL, and how those of an earlier version become those of this one.

    entrepot_schema     one row: the version of the tables, and the identity of the records
    entrepot_records    a record in a row
    entrepot_writers    always empty: writers lock it, each for the time of a transaction

They are in the first schema of the search path, which is made if it is not there.

Keys are bytes: their order does not depend on the collation of the database, nor their form on its encoding.
Writers lock a table of its own: a lock on the records themselves would end the vacuuming of these.
"""

from __future__ import annotations

from storage.errors import StorageFailed
from storage.keys import BLOB, LINK, TAG, RecordKind
from storage.postgres.connections import DatabaseConnection


def _bytes(text: str) -> str:
    """A constant of SQL."""
    return f"'\\x{text.encode().hex()}'::bytea"


def _keys(kind: RecordKind) -> str:
    """All keys of a kind."""
    return f"key >= {_bytes(kind.prefix())} AND key < {_bytes(f'{kind.name}!')}"


# A tag's target is the first field of its record.  PostgreSQL keeps an index of the tags by it.
TAGS = _keys(TAG)
TARGET = "substring(value FROM 1 FOR greatest(position('\\x20'::bytea IN value) - 1, 0))"
# A link's digest is the last field of its key.
LINKS, BLOBS = _keys(LINK), _keys(BLOB)
_FIELDS = f"substring(key FROM {len(LINK.prefix()) + 1})"
DIGEST = f"substring({_FIELDS} FROM position('\\x20'::bytea IN {_FIELDS}) + 1)"

# Each statement list leads from the version before to the next one.  What is released never changes.
MIGRATIONS = (
    f"""
    CREATE TABLE entrepot_records (key bytea PRIMARY KEY, value bytea NOT NULL);
    CREATE TABLE entrepot_writers ();
    CREATE INDEX entrepot_tags ON entrepot_records (({TARGET}), key) WHERE {TAGS};
    """,
    f"""
    CREATE INDEX entrepot_links ON entrepot_records (({DIGEST})) WHERE {LINKS};
    CREATE INDEX entrepot_blobs ON entrepot_records (value, key) WHERE {BLOBS};
    """,
)
VERSION = len(MIGRATIONS)


class SchemaTooNew(StorageFailed):
    """A later version of this program has changed the tables."""


def migrate(connection: DatabaseConnection, name: str) -> str:
    """Make the tables, or bring them to this version; returns the identity of the records.

    Raises SchemaTooNew and psycopg.Error.
    """
    if version_of(connection) != VERSION:
        _bring_to_version(connection, name)
    return identity_of(connection)


def identity_of(connection: DatabaseConnection) -> str:
    """The identity of the records; "" without any.  Raises psycopg.Error."""
    row = connection.execute("SELECT identity::text FROM entrepot_schema").fetchone()
    return str(row[0]) if row else ""


def _bring_to_version(connection: DatabaseConnection, name: str) -> None:
    with connection.transaction():
        # One at a time: two that make the same table fail, even by IF NOT EXISTS.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('entrepot_schema', 0))")
        connection.execute("SET LOCAL statement_timeout = 0")  # an index of millions of records takes minutes
        found = version_of(connection)
        if found > VERSION:
            raise SchemaTooNew(
                f"the records in {name} have schema {found}, and this version knows schema {VERSION}:"
                " use the version of entrepot that made it, or a later one",
                cause="its database is of a later version",
            )
        if not found:
            _make_schema(connection)
            columns = "version integer NOT NULL, identity uuid NOT NULL DEFAULT gen_random_uuid()"
            connection.execute(f"CREATE TABLE entrepot_schema ({columns})".encode())
            connection.execute("INSERT INTO entrepot_schema (version) VALUES (0)")
        for statements in MIGRATIONS[found:]:
            connection.execute(statements.encode())
        connection.execute("UPDATE entrepot_schema SET version = %s", (VERSION,))


def _make_schema(connection: DatabaseConnection) -> None:
    """Make the schema of a search path that leads to none."""
    found = connection.execute("SELECT current_setting('search_path') WHERE current_schema() IS NULL")
    row = found.fetchone()
    if row is not None and "," not in row[0]:
        connection.execute(f"CREATE SCHEMA {row[0]}".encode())


def version_of(connection: DatabaseConnection) -> int:
    """The version of the tables; 0 if there are none."""
    # Not by to_regclass(): after the lock was waited for, it would answer by what it knew before.
    table = "SELECT FROM pg_class WHERE relname = 'entrepot_schema' AND pg_table_is_visible(oid)"
    if connection.execute(table).fetchone() is None:
        return 0
    row = connection.execute("SELECT version FROM entrepot_schema").fetchone()
    return int(row[0]) if row else 0
