"""The hub of the program that a worker belongs to, as it was told: what it takes to use it is loaded when it is used."""

from __future__ import annotations

hub: tuple[str, bytes] | None = None  # see _hub.launch.Address
