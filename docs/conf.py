"""Sphinx: how these pages are built (``tox -e docs``)."""

from __future__ import annotations

from importlib.metadata import version as _version

project = "fiberexec"
copyright = "The fiberexec authors"
version = release = _version("fiberexec")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "fiberexec"
