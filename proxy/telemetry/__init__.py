"""Logs, metrics, traces, what is recorded of one exchange, usage counts."""
