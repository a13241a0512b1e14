"""A laboratory: the newest releases of clients, tried against a server.  `python -m tests.clients.newest`."""
