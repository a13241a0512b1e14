"""What a registry is, and where its content rests on a disk.  Knows no HTTP, no configuration.

The public API is in __all__.  Where to begin: `Registry` is the interface of everything that holds
repositories; `storage.oci` has the types of its methods, and `storage.errors` their errors.  `Store` is a
registry on a disk, made of `BlobFiles` and `SQLiteRecords`, whose keys `storage.keys` builds.
`storage.maintenance` removes and checks its content.
"""

from typing import TYPE_CHECKING

from storage.exports import PublicNames

if TYPE_CHECKING:
    from storage.bucket.blobs import BucketBlobs
    from storage.bucket.objects import Bucket, healthy
    from storage.bucket.settings import BucketSettings
    from storage.disk.blobs import BlobFiles
    from storage.disk.records import SQLiteRecords
    from storage.errors import (
        BlobUnknown,
        Denied,
        DigestInvalid,
        ManifestBlobUnknown,
        ManifestInvalid,
        ManifestUnknown,
        NameUnknown,
        RegistryError,
        StorageFailed,
        Unavailable,
        Unsupported,
    )
    from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag
    from storage.postgres.records import PostgresRecords
    from storage.registry import Blob, Registry, Upload
    from storage.store import Store

    __all__ = [
        "Blob",
        "BlobFiles",
        "BlobUnknown",
        "Bucket",
        "BucketBlobs",
        "BucketSettings",
        "Denied",
        "Descriptor",
        "Digest",
        "DigestInvalid",
        "Manifest",
        "ManifestBlobUnknown",
        "ManifestInvalid",
        "ManifestUnknown",
        "NameUnknown",
        "PostgresRecords",
        "Reference",
        "Registry",
        "RegistryError",
        "SQLiteRecords",
        "Span",
        "StorageFailed",
        "Store",
        "Tag",
        "Unavailable",
        "Unsupported",
        "Upload",
        "healthy",
    ]
else:  # __all__ has what is installed: the extra `fleet` has libraries that some names need
    _names = PublicNames(
        __name__,
        {
            "storage.bucket.blobs": "BucketBlobs",
            "storage.bucket.objects": "Bucket healthy",
            "storage.bucket.settings": "BucketSettings",
            "storage.disk.blobs": "BlobFiles",
            "storage.disk.records": "SQLiteRecords",
            "storage.errors": "BlobUnknown Denied DigestInvalid ManifestBlobUnknown ManifestInvalid"
            " ManifestUnknown NameUnknown RegistryError StorageFailed Unavailable Unsupported",
            "storage.oci": "Descriptor Digest Manifest Reference Span Tag",
            "storage.postgres.records": "PostgresRecords",
            "storage.registry": "Blob Registry Upload",
            "storage.store": "Store",
        },
        {
            "storage.bucket.blobs": ("obstore", "fleet"),
            "storage.bucket.objects": ("obstore", "fleet"),
            "storage.bucket.settings": ("obstore", "fleet"),
            "storage.postgres.records": ("psycopg", "fleet"),
        },
    )
    __getattr__, __dir__ = _names.get, _names.listed
