"""One process, and what it prints.

    python examples/mp/hello.py
"""

from __future__ import annotations

from fiberexec import mp

mp.Process(target=print, args=("Hello, fiberexec!",)).start()
