"""multiprocessing's own module, under this name too: how descriptors travel."""

from __future__ import annotations

import sys
from multiprocessing import resource_sharer
from multiprocessing.resource_sharer import *  # noqa: F403  # for those who only read

sys.modules[__name__] = resource_sharer
