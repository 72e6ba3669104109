"""multiprocessing's own module, under this name too: pickling for child processes."""

from __future__ import annotations

import sys
from multiprocessing import reduction
from multiprocessing.reduction import *  # noqa: F403  # for those who only read

sys.modules[__name__] = reduction
