"""What servers share: records in a database and content in a bucket, as the configuration says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from proxy.cache.copies import BlobCopies
from proxy.cache.deposits import Deposits
from proxy.cache.shared_store import PATIENCE, SharedStore
from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.config.shared import CACHES, SharedConfig
from proxy.extensions.extension import Extensions
from proxy.upstream.connect import Connect
from proxy.upstream.signed_objects import SignedObjects
from storage.disk.health import DiskHealth
from storage.disk.troubles import Troubles
from storage.errors import StorageFailed
from storage.records import Records, SharedRecords
from storage.store import Store

if TYPE_CHECKING:  # one machine needs no client of object storage
    from storage.bucket.blobs import BucketBlobs
    from storage.bucket.objects import Bucket, BucketHealth, Signing
    from storage.bucket.settings import BucketSettings

CONNECTED = 5.0  # seconds for a connection to a bucket
ANSWERED = 30.0  # seconds for an answer of it, at most


def bucket_blobs(
    config: Config,
    records: Records,
    root: Path,
    disk: DiskHealth,
    clock: Callable[[], float],
    troubles: Troubles,
    part: str = "",
    patience: float | None = None,
    copies: BlobCopies | None = None,
    extensions: Extensions | None = None,
    reader: SignedObjects | None = None,
) -> BucketBlobs:
    """The blobs in a bucket, or in a `part` of it, and their `copies` here.  Raises StartError.

    The caller closes `reader`, which reads large ones.  Of `extensions` one may be the bucket; without them
    it is made here.
    """
    try:
        # Only here: one machine needs no client of object storage.
        from storage.bucket.blobs import BucketBlobs, keep_nothing
        from storage.bucket.objects import BucketHealth
    except ImportError as error:
        raise StartError(f"shared.bucket needs obstore ({error}): install entrepot[fleet]") from error
    settings = config.shared.settings(part)
    health = BucketHealth(settings.url, root, clock, troubles)
    bucket: Bucket
    if (name := config.shared.extension) is not None:
        from proxy.namespaces.extended_bucket import ExtensionBucket

        made = (extensions or Extensions(config.extensions, clock=clock)).make(name)
        bucket = ExtensionBucket(made, urlsplit(settings.url).path.strip("/"), health)
    else:
        bucket = _connected(config, settings, health, patience, reader)
    keep = keep_nothing if copies is None else copies.keep
    return BucketBlobs(bucket, records, root, clock, disk, keep=keep)


def _connected(
    config: Config,
    settings: BucketSettings,
    health: BucketHealth,
    patience: float | None,
    reader: SignedObjects | None,
) -> Bucket:
    """The bucket, of which nothing is asked yet.  Raises StartError."""
    from storage.bucket.objects import Bucket
    from storage.bucket.signed_requests import signed_requests

    try:
        store, signing = settings.connect(), _signing(config, settings)
    except (ValueError, OSError) as error:
        raise StartError(f"shared.bucket: {error}") from error
    own = signed_requests(settings, store)
    return Bucket(store, settings.url, health, settings.storage_class, patience, signing, reader, own)


def signed_objects(shared: SharedConfig) -> SignedObjects | None:
    """What reads the objects of the bucket by signed URLs; None without one, or where they do not serve.

    They are for S3, whose signatures need no request.  A proxy that only the environment names is left to the
    client of the bucket.
    """
    if not (shared.bucket or "").startswith("s3:") or (shared.proxy is None and getproxies_environment()):
        return None
    connect = Connect(
        ca_file=shared.ca, proxy=shared.proxy, connect_timeout=CONNECTED, header_timeout=ANSWERED
    )
    return SignedObjects(str(shared.bucket), connect, quick=shared.access_key is not None)


def _signing(config: Config, settings: BucketSettings) -> Signing | None:
    """How clients are led to the bucket, if they are.  Raises ValueError, OSError."""
    from storage.bucket.objects import Signing

    if (redirect := config.redirect) is None:
        return None
    endpoint = settings.endpoint if redirect.endpoint is None else redirect.endpoint
    return Signing(replace(settings, endpoint=endpoint).connect(), redirect.above, redirect.valid_for)


def database(
    shared: SharedConfig,
    clock: Callable[[], float],
    troubles: Troubles,
    check: Callable[[str], None] = lambda identity: None,
    part: str = "",
) -> SharedRecords:
    """The records in a database, or in a `part` of it.  Raises StartError."""
    try:
        # Only here: one machine needs no client of a database.
        from storage.postgres.records import PostgresRecords
    except ImportError as error:
        raise StartError(f"shared.records needs psycopg ({error}): install entrepot[fleet]") from error
    try:
        return PostgresRecords(str(shared.records), clock, troubles, shared.connections, check, part)
    except StorageFailed as error:
        raise StartError(f"shared.records: {error}") from error


def shared_caches(
    config: Config,
    store: Store,
    clock: Callable[[], float],
    troubles: Troubles,
    extensions: Extensions | None = None,
    reader: SignedObjects | None = None,
) -> tuple[SharedStore, Deposits]:
    """The store that the caches of several servers share, and what hands over the blobs of `store` to it.

    Raises StartError.
    """
    root = config.disk.path / "shared"
    records = database(config.shared, clock, troubles, part=CACHES)
    try:
        disk = DiskHealth(root, clock, troubles)
        blobs = bucket_blobs(
            config,
            records,
            root,
            disk,
            clock,
            troubles,
            CACHES,
            PATIENCE,
            extensions=extensions,
            reader=reader,
        )
    except BaseException:
        records.close()
        raise
    shared = SharedStore(blobs, records, clock)
    return shared, Deposits(store, shared, blobs)
