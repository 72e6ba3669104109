"""multiprocessing's own module, under this name too: finalizers, logging."""

from __future__ import annotations

import sys
from multiprocessing import util
from multiprocessing.util import *  # noqa: F403  # for those who only read

sys.modules[__name__] = util
