"""Logs, metrics, what is recorded of one exchange, usage counts."""
