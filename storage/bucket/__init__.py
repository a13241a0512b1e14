"""Object storage: blobs as the objects of a bucket."""
