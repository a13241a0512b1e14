"""The indexes over records that SQLite keeps beside that of the keys: what they are, and their look-ups.

SQLite itself keeps them: so they are right whatever writes a record, also a former version, and after a
crash.  The first process that needs an index makes it, which takes seconds for a million records.
"""

from __future__ import annotations

from storage.disk.salvage import CHECKSUM_BYTES
from storage.keys import BLOB, LINK, TAG, RecordKind


def _keys(kind: RecordKind) -> str:
    """All keys of a kind.  SQLite uses an index of them only for a statement with the same words."""
    return f"key >= '{kind.prefix()}' AND key < '{kind.name}!'"


_VALUE = f"substr(value, {CHECKSUM_BYTES + 1})"
# The tags by their target, the first field of their records.
_TARGET = f"substr(value, {CHECKSUM_BYTES + 1}, instr({_VALUE}, x'20') - 1)"
TAGS = f"CREATE INDEX IF NOT EXISTS Tags_by_target ON Cache ({_TARGET}, key) WHERE {_keys(TAG)}"
# Of several bounds of the key, SQLite searches between the first two; the last lets it use the index.
POINTING = (
    f"SELECT key, value FROM Cache WHERE key > ? AND key < ? AND {_TARGET} = ? AND {_keys(TAG)} AND raw = 1"
    " ORDER BY key"
)
# The links by their digest, the last field of their keys.
_AFTER_KIND = f"substr(key, {len(LINK.prefix()) + 1})"
_DIGEST = f"substr({_AFTER_KIND}, instr({_AFTER_KIND}, ' ') + 1)"
LINKS = f"CREATE INDEX IF NOT EXISTS Links_by_digest ON Cache ({_DIGEST}) WHERE {_keys(LINK)}"
# +key: otherwise SQLite might read all links instead.
LINKING = f"SELECT key FROM Cache WHERE {_DIGEST} = ? AND {_keys(LINK)} AND raw = 1 ORDER BY +key"
# The blobs by their records, which begin with the time of last use.
BLOBS = f"CREATE INDEX IF NOT EXISTS Blobs_by_use ON Cache ({_VALUE}, key) WHERE {_keys(BLOB)}"
OLDEST = (
    f"SELECT key, value FROM Cache WHERE {_VALUE} >= ? AND ({_VALUE} > ? OR key > ?) AND {_keys(BLOB)}"
    f" AND raw = 1 ORDER BY {_VALUE}, key LIMIT ?"
)
