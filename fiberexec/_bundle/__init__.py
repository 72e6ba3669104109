"""Code and files of the driver's host for workers on other hosts.

A worker whose image lacks a module asks the driver for it: `install` (worker), `bundle` (driver). What ``ship``
names goes to every job: `check_ship` and `ship` (driver), `unpack` (agent). What travels is an archive under a digest
of its content, so that a host unpacks it once. A worker loads no more than `_install`, which is light.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._install import install, unpack
    from ._modules import bundle
    from ._ship import check_ship, ship

__all__ = ["bundle", "check_ship", "install", "ship", "unpack"]
_HOMES = {"bundle": "_modules", "check_ship": "_ship", "install": "_install", "ship": "_ship", "unpack": "_install"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
