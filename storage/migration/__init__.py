"""Taking over the directory of another registry; moving a registry to other engines; backups."""
