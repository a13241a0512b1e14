"""The same work done by Entrepôt and its peers on this machine, in turn; `python -m tests.bench --help`."""
