"""The disk: blobs, uploads and records as files, and what is wrong with it."""
