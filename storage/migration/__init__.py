"""Taking over the directory of another registry."""
