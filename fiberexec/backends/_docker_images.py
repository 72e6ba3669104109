"""The image that a backend's containers run: made or pulled when it is first needed, and what is known of it since."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from typing import Any, NamedTuple

from fiberexec._errors import ConfigError, LaunchError
from fiberexec.backends import _images
from fiberexec.backends._docker_options import Options
from fiberexec.backends._image_errors import quoted, verdict

EARLY = 10.0  # seconds: a container that ends by itself before may be one that cannot work
_PROOFS = 3  # so many early ends, and none that lived longer, prove it
_NOBODY = "65534:65534"


class Image(NamedTuple):
    """An image that the engine has."""

    name: str
    id: str
    user: str | None  # whom its containers run as; None: as it says itself
    folder: str | None  # where they start; None: where it says itself
    python: str  # the version that it claims to have, "" where it says nothing


class Answer(Exception):
    """An error in the middle of what the engine answers."""


class Images:
    """One backend's image. Any thread may call; all wait while it is being made."""

    def __init__(self, wanted: Options) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._image: Image | None = None
        self._verdicts: dict[str, LaunchError] = {}  # of images, by id
        self._early: dict[str, int] = {}  # ends of containers that did not live long; -1: some did
        self.doing = ""  # what holds up all starts

    def ready(self, client: Any) -> Image:
        """The image, made or pulled if need be. Raises LaunchError, and what the SDK raises."""
        with self._lock:
            if self._image is None:
                try:
                    self._image = self._prepare(client)
                finally:
                    self.doing = ""
            image = self._image
        if image.id in self._verdicts:
            raise LaunchError(str(self._verdicts[image.id]), final=True)
        return image

    def forget(self) -> None:
        """It is not there any more."""
        with self._lock:
            self._image = None

    def _prepare(self, client: Any) -> Image:
        missing = import_module("docker.errors").ImageNotFound
        wanted, platform = self._wanted, self._wanted.container.get("platform")
        name = wanted.image or self._build(client, platform)
        if wanted.image is not None and wanted.pull == "always":
            self._pull(client, name, platform)
        try:
            about = client.api.inspect_image(name)
        except missing:
            if wanted.pull == "never":
                raise LaunchError(
                    f'image {name!r} is not on the Docker engine, and pull="never" forbids to fetch it. What to do: '
                    f"docker pull {name}, or build it",
                    final=True,
                ) from None
            self._pull(client, name, platform)
            about = client.api.inspect_image(name)
        return self._described(name, about)

    def _build(self, client: Any, platform: str | None) -> str:
        wanted = self._wanted
        try:
            recipe = _images.find(os.getcwd(), wanted.dockerfile, wanted.base_image, wanted.build_args)
        except ConfigError as error:
            raise LaunchError(str(error), final=True) from None
        self.doing = f"an image is being built from {recipe.source}"
        return _images.build(client, recipe, wanted.build_args, platform, self._built)

    def _built(self, line: str) -> None:
        self.doing = f"an image is being built: {line}"

    def _pull(self, client: Any, name: str, platform: str | None) -> None:
        self.doing = f"image {name} is being pulled"
        repository, tag = import_module("docker.utils").parse_repository_tag(name)
        error = ""
        for answer in client.api.pull(repository, tag=tag or "latest", stream=True, decode=True, platform=platform):
            error = error or str(answer.get("error", ""))  # read on, or the connection stays open
        if error:
            raise Answer(error)

    def _described(self, name: str, about: dict[str, Any]) -> Image:
        config = about.get("Config") or {}
        user, folder = self._wanted.user, None
        if user is None and str(config.get("User") or "root").partition(":")[0] in ("root", "0"):
            user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else _NOBODY
            folder = "/tmp" if (config.get("WorkingDir") or "/") == "/" else None  # somewhere where it may write
        versions = [text.partition("=")[2] for text in config.get("Env") or () if text.startswith("PYTHON_VERSION=")]
        return Image(name, str(about["Id"]), user, folder, versions[0] if versions else "")

    def judge(self, image: Image, job: str, code: int, log: str, *, memory: bool, lived: float, others: bool) -> str:
        """Learn from a container that ended by itself; return why no other can do better, "" if it may.

        ``memory``: something in it was killed for want of memory. ``others``: containers of this image have lived longer.
        """
        if not 0 < code < 128 or lived >= 6 * EARLY:
            return ""
        reason = verdict(image.name, log, image.python)
        with self._lock:
            seen = self._early.get(image.id, 0)
            if others or lived >= EARLY:
                self._early[image.id] = -1  # it can work
            elif seen >= 0 and not memory:
                self._early[image.id] = seen + 1
                if seen + 1 >= _PROOFS and not reason:
                    reason = f"containers of image {image.name!r} end at once"
            if reason:
                text = f"Docker: {reason}. Container {job} ended with exit code {code}{quoted(log)}"
                self._verdicts.setdefault(image.id, LaunchError(text, final=True))
        return reason
