"""The tests.

Compiled modules are written to disk even if PYTHONDONTWRITEBYTECODE is set.  Otherwise every process compiles
them again: that takes ten seconds for all test modules, and more for each server that a test starts.

The file of the system's authorities has only one, for no test asks a server of the internet: to read all
takes 40 ms of each process that imports aiohttp, and 20 ms of each TLS context.
"""

import os
import sys
from pathlib import Path

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
ONE_AUTHORITY = {"SSL_CERT_FILE": str(Path(__file__).parent / "data/signatures/notary-ec.pem")}
os.environ.update(ONE_AUTHORITY)
