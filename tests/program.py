"""Run a program that is given as text, as `python -c` does, but with imports made already (preloaded.py).

python -m tests.program TEXT ARGUMENT…
"""

from __future__ import annotations

import sys

exec(compile(sys.argv.pop(1), "<program>", "exec"), {"__name__": "__main__"})
