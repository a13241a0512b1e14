"""Webhooks: the queues of events, their formats, and their delivery to other servers."""
