"""What several servers share, and the bucket that holds their content."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from proxy.config.fields import Duration, File, Keep, Section, Size, Text
from proxy.config.hosts import parse_proxy, parse_url
from proxy.config.values import Secret, parse_count, parse_secret, parse_text

if TYPE_CHECKING:
    from storage.bucket.settings import BucketSettings

CACHES = "caches"  # the part of the database and of the bucket that the caches have
SCHEMES = ("s3", "gs", "az")  # S3 and what is compatible with it, Google Cloud Storage, Azure Blob Storage
EXTENSION = "extension"  # the scheme of a bucket that is an extension


def parse_database(value: object) -> Secret:
    """The URL of a PostgreSQL database; a Secret, since it may hold a password."""
    text = parse_secret(value)
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected postgresql://user:password@host:port/database")
    return text


def parse_bucket(value: object) -> str:
    """The URL of a bucket, with the prefix of the keys of its objects."""
    text = parse_text(value)
    parts = urlsplit(text)
    if (
        parts.scheme not in (*SCHEMES, EXTENSION)
        or not parts.netloc
        or any(each in parts.netloc for each in "@:")
    ):
        raise ValueError(
            "expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, or extension://name/prefix"
        )
    if parts.query or parts.fragment or not set(parts.path.strip("/").split("/")).isdisjoint((".", "..")):
        raise ValueError("expected a bucket and a prefix, without ?, # and ..")
    if "//" in parts.path:
        raise ValueError("has an empty part in its prefix")
    return text


class SharedCaches(Section, frozen=True):
    """The content that the caches of several servers have in common, in the bucket; None is no limit."""

    cache_limit: Size | None = None
    keep_for: Keep = math.inf


class SharedConfig(Section, frozen=True):
    """What several servers share.

    records: the URL of a PostgreSQL database, for the records of the private registry
    connections: how many connections to it each process has at most
    remember_for: for how many seconds what was read there counts while it cannot be read; 0 for no time
    caches: also of the caches, whose content on the disk is then a part of what they share
    bucket: where the content of the private registry is, and the keys below how it is reached: see
        BucketSettings (storage/bucket/settings.py)
    """

    records: Annotated[Secret | None, parse_database] = None
    connections: Annotated[int, parse_count] = 4
    remember_for: Duration = 3600.0
    caches: SharedCaches | None = None
    bucket: Annotated[str | None, parse_bucket] = None
    endpoint: Annotated[str | None, parse_url] = None
    region: Text | None = None
    access_key: Annotated[Secret | None, parse_secret] = None
    secret_key: Annotated[Secret | None, parse_secret] = None
    session_token: Annotated[Secret | None, parse_secret] = None
    storage_class: Text | None = None
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    encryption_key: Text | None = None
    ca: File | None = None
    proxy: Annotated[Secret | None, parse_proxy] = None

    @property
    def extension(self) -> str | None:
        """The extension that is the bucket; None if another bucket, or none, is."""
        parts = urlsplit(self.bucket or "")
        return parts.netloc if parts.scheme == EXTENSION else None

    def settings(self, part: str = "") -> BucketSettings:
        """How `bucket`, or a `part` of it, is reached.  Raises ImportError without the extra `fleet`."""
        from storage.bucket.settings import BucketSettings

        given = {each.name: getattr(self, each.name, None) for each in fields(BucketSettings)}
        url = f"{str(self.bucket).rstrip('/')}/{part}" if part else str(self.bucket)
        return BucketSettings(url=url, **{name: each for name, each in given.items() if each})

    def __post_init__(self) -> None:
        if self.caches is not None and (self.records is None or self.bucket is None):
            missing = "records, a database," if self.records is None else "bucket"
            raise ValueError(f"caches needs {missing} as well: servers share both, or neither")
        given = [name for name in _OF_BUCKETS if getattr(self, name) is not None]
        if self.bucket is None:
            if given:
                raise ValueError(f"{given[0]} is for a bucket: set bucket, such as s3://name/prefix")
            return
        scheme = urlsplit(self.bucket).scheme
        for name in given:
            if scheme not in _OF_BUCKETS[name]:
                fits = " and ".join(f"{each}://" for each in _OF_BUCKETS[name])
                raise ValueError(f"{name} is for {fits}, and bucket is {scheme}://")
        if scheme != "gs" and self.secret_key is not None and self.access_key is None:
            raise ValueError("secret_key needs access_key")
        if self.session_token is not None and self.secret_key is None:
            raise ValueError("session_token needs access_key and secret_key")
        if scheme == "s3" and self.access_key is not None and self.secret_key is None:
            raise ValueError("access_key needs secret_key")
        if self.encryption_key is not None and not (self.encryption or "").startswith("aws:kms"):
            raise ValueError("encryption_key needs encryption: aws:kms")


# The keys of a bucket, with the schemes of those that have them.
_OF_BUCKETS = {
    "endpoint": SCHEMES,
    "region": ("s3",),
    "access_key": ("s3", "az"),
    "secret_key": SCHEMES,
    "session_token": ("s3",),
    "storage_class": SCHEMES,
    "encryption": ("s3",),
    "encryption_key": ("s3",),
    "ca": SCHEMES,
    "proxy": SCHEMES,
}
