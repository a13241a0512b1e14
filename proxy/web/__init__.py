"""The distribution API over HTTP: routes, requests, responses, listeners, TLS."""
