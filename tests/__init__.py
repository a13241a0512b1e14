"""The tests.

Their processes share what they have compiled, also where Python is told to write none of it: pytest takes ten
seconds to compile all test modules, and every server that a test starts compiles its own.
"""

import os
import sys

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
