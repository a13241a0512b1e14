"""The tests.

Compiled modules are written to disk even if PYTHONDONTWRITEBYTECODE is set.  Otherwise every process compiles
them again: that takes ten seconds for all test modules, and more for each server that a test starts.
"""

import os
import sys

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
