"""How the signatures in tests/data/signatures were made, by the real tools."""
