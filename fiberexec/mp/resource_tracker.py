"""multiprocessing's own module, under this name too: what unlinks at a program's end what nobody has unlinked."""

from __future__ import annotations

import sys
from multiprocessing import resource_tracker
from multiprocessing.resource_tracker import *  # noqa: F403  # for those who only read

sys.modules[__name__] = resource_tracker
