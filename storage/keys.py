"""The keys of all records: what each kind of record is called, and which fields its key has.

A key is the name of its kind and then its fields, with a space between two of them:

    tag <repository> <tag>                      where a tag points
    manifest <repository> <digest>              a manifest's media type and content
    link <repository> <digest>                  a blob that a repository shows
    blobs <digest>                              when a stored blob was used as far as is known; its size
    referrers <repository> <subject> <digest>   a manifest that refers to `subject`
    listing <repository> <what>                 what an origin listed, or does not have
    absent <slot>                               what an origin does not have, for as long as the slot is its
    pushed <repository>                         how often the repository's tags and manifests changed
    lease <repository> <digest>                 when a push in progress last learned that a manifest is stored
    pulled <repository> <tag>                   when a tag of a private registry was last pulled
    watched                                     when a private registry was watched, for its retention rules
    use <repository> <reference>                how often a tag or a manifest was used
    moves <repository> <tag>                    where a tag pointed before
    resolved <repository> <tag>                 what a tag stood for when clients asked, with times
    asked <day> <repository> <reference>        who pulled a tag or a digest on a day
    override <image>                            an exception from the policy, for some time
    held <repository> <tag>                     where a tag is held by the policy, and where it would move
    stats <period> <time> <namespace>           counters of an hour or a day
    pin <pattern>                               a pin that was set by command
    act <subject>                               what an operator did, for replicas that were down then
    scrub <part>                                when a part of the store was last verified
    warmed <rule>                               the last run of a warming rule
    collected                                   the report of the last garbage collection
    object <digest>                             the object that a blob in a bucket is
    leftover <key>                              an object that is no blob, or not yet
    upload <id>                                 the parts of an upload that any server goes on with
    deposit <digest>                            a blob to hand over to the store that servers share
    reported                                    until when that store has been told what is used
    total <repository>                          how many records a repository has, and of how many bytes
    stored <algorithm>/<ab>                     how many blobs a fan-out directory has, and of how many bytes
    counted                                     that everything without a total is empty
    writers                                     who may write the records of a private registry
    outbox <process> <number>                   an event that the webhooks' queue may not have yet
    identity                                    by which a bucket is known to belong to the records
    remembered <key>                            what is known of a record in a database, if that is lost
    confirmed                                   when all that is remembered was last compared with it

in the records of access control:

    signing <id>                                a key by which tokens are signed
    apikey <name>                               an API key, of which only a hash is kept
    keyused <name>                              when an API key was last used

and in the records of the webhooks' queue:

    event <webhook> <number>                    an event to deliver
    pending <webhook>                           how many events a webhook has to receive
    webhook <webhook>                           the state of its last deliveries
    number                                      the number that was given to an event last

Names, tags and digests hold no space, and a space sorts before every character that they do hold: so a scan
over a prefix is in the order of the fields.  The last field of a key may hold spaces.

Repositories are full names: they begin with the namespace.  COPIES is none, so that no request leads there.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.oci import Digest, Reference, Tag


@dataclass(frozen=True, slots=True)
class RecordKind:
    """A kind of record; builds and parses the keys of its records."""

    name: str
    fields: int = 2

    def key(self, *values: str) -> str:
        """The key of one record."""
        if len(values) != self.fields:
            raise TypeError(f"a key of {self.name!r} has {self.fields} fields, not {len(values)}")
        return " ".join((self.name, *values))

    def prefix(self, *values: str) -> str:
        """The start of all keys whose first fields are `values`."""
        return " ".join((self.name, *values, ""))

    def start(self, value: str) -> str:
        """The start of all keys whose first field starts with `value`."""
        return f"{self.name} {value}"

    def within(self, namespace: str) -> str:
        """The start of all keys of repositories of `namespace`."""
        return f"{self.name} {namespace}/"

    def parse(self, key: str) -> list[str]:
        """The fields of a key of this kind; one that a damaged key does not have is empty."""
        values = key.split(" ", self.fields)[1:]
        return values + [""] * (self.fields - len(values))


EVERY = ""  # the prefix of all keys
COPIED = "(bucket)"  # no namespace's name, and no host's
COPIES = f"{COPIED}/copies"  # links what caches have of that which the private registry has in a bucket
TAG = RecordKind("tag")
MANIFEST = RecordKind("manifest")
LINK = RecordKind("link")
BLOB = RecordKind("blobs", 1)
REFERRER = RecordKind("referrers", 3)
LISTING = RecordKind("listing")
ABSENT = RecordKind("absent", 1)
CHANGES = RecordKind("pushed", 1)
LEASE = RecordKind("lease")
PULLED = RecordKind("pulled")
WATCHED = RecordKind("watched", 0)
USE = RecordKind("use")
MOVES = RecordKind("moves")
HELD = RecordKind("held")
RESOLVED = RecordKind("resolved")
ASKED = RecordKind("asked", 3)
OVERRIDE = RecordKind("override", 1)
STATISTICS = RecordKind("stats", 3)
PIN = RecordKind("pin", 1)
ACT = RecordKind("act", 1)
SCRUB = RecordKind("scrub", 1)
WARMING = RecordKind("warmed", 1)
COLLECTED = RecordKind("collected", 0)
OBJECT = RecordKind("object", 1)
LEFTOVER = RecordKind("leftover", 1)
UPLOAD = RecordKind("upload", 1)
DEPOSIT = RecordKind("deposit", 1)
REPORTED = RecordKind("reported", 0)
TOTAL = RecordKind("total", 1)
STORED = RecordKind("stored", 1)
COUNTED = RecordKind("counted", 0)
WRITERS = RecordKind("writers", 0)
OUTBOX = RecordKind("outbox")
IDENTITY = RecordKind("identity", 0)
REMEMBERED = RecordKind("remembered", 1)
CONFIRMED = RecordKind("confirmed", 0)
SIGNING = RecordKind("signing", 1)
API_KEY = RecordKind("apikey", 1)
KEY_USED = RecordKind("keyused", 1)
EVENT = RecordKind("event")
PENDING = RecordKind("pending", 1)
WEBHOOK = RecordKind("webhook", 1)
NUMBER = RecordKind("number", 0)


# The kinds of records that totals count, by the key of the total: in the order of their keys.
_OF_REPOSITORIES = (LINK, LISTING, MANIFEST, REFERRER, TAG, USE)
COUNTABLE = {kind.name: kind for kind in (BLOB, *_OF_REPOSITORIES)}


def countable(key: str) -> RecordKind | None:
    """The kind of a record that a total counts; None for any other record."""
    return COUNTABLE.get(key.partition(" ")[0])


def total_key(key: str) -> str:
    """The key of the total that counts the record `key`."""
    kind, _, fields = key.partition(" ")
    if kind == BLOB.name:
        algorithm, _, encoded = fields.partition(":")
        return STORED.key(f"{algorithm}/{encoded[:2]}")
    return TOTAL.key(fields.partition(" ")[0])


def is_total(key: str) -> bool:
    """Whether it is the key of a total, or says which totals there are."""
    return key == COUNTED.key() or key.startswith((TOTAL.prefix(), STORED.prefix()))


def counted_by(key: str) -> list[str]:
    """The prefixes of the records that the total `key` counts, in order."""
    if key.startswith(STORED.prefix()):
        algorithm, _, start = STORED.parse(key)[0].partition("/")
        return [f"{BLOB.prefix()}{algorithm}:{start}"]
    return [kind.prefix(TOTAL.parse(key)[0]) for kind in _OF_REPOSITORIES]


def parse_reference_key(key: str) -> tuple[str, Reference]:
    """The repository and the reference of the key of a tag or a manifest."""
    if key.startswith(TAG.prefix()):
        repository, reference = TAG.parse(key)
        return repository, Tag(reference)
    repository, reference = MANIFEST.parse(key)
    return repository, Digest(reference)
