"""What a registry is, and where its content rests on a disk.  Knows no HTTP, no configuration.

Where to begin: `storage.registry.Registry` is the interface of everything that holds repositories;
`storage.oci` has the types of its methods, and `storage.errors` their errors.  `storage.store.Store` is a
registry on a disk, made of `storage.disk.blobs` and `storage.disk.records`, whose keys `storage.keys` builds.
`storage.maintenance` removes and checks its content.
"""
