"""What a registry is, and where its content rests on a disk.  Knows no HTTP, no configuration."""
