"""multiprocessing's own module, under this name too: processes that are threads."""

from __future__ import annotations

import sys
from multiprocessing import dummy
from multiprocessing.dummy import *  # noqa: F403  # for those who only read

sys.modules[__name__] = dummy
