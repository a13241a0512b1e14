"""Mounts of a blob from a namespace in another one."""

from __future__ import annotations

from storage.errors import BlobUnknown, RegistryError
from storage.oci import Descriptor, Digest
from storage.registry import Registry


async def copy_blob(
    source: Registry, name: str, target: Registry, repository: str, digest: Digest, shown: str
) -> Descriptor:
    """Copy a blob from a cache into a store, as a client would that pulls and pushes it.

    Raises BlobUnknown, which calls the source `shown`, if that fails: the client then uploads the blob.
    """
    try:
        blob = await source.get_blob(name, digest)
        try:
            size = blob.descriptor.size
            upload = await target.start_upload(repository, None if size < 0 else size, digest.algorithm)
            try:
                async for chunk in blob.chunks():
                    await upload.write(chunk)
                return await upload.commit(digest)
            except BaseException as error:
                await upload.cancel(error)
                raise
        finally:
            await blob.close()
    except RegistryError as error:
        raise BlobUnknown(f"{digest} cannot be mounted from {shown}: {error}") from error
