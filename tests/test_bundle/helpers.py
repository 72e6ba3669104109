"""What the tests of code and files for other hosts have in common."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

from fiberexec._bundle import _install, bundle


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())


def names(packed: tuple[str, bytes] | None) -> dict[str, bytes]:
    assert packed is not None
    assert packed[0], packed[1].decode()
    with zipfile.ZipFile(io.BytesIO(packed[1])) as archive:
        return {one: archive.read(one) for one in archive.namelist()}


def reason(packed: tuple[str, bytes] | None) -> str:
    assert packed is not None
    assert packed[0] == "", "it was sent"
    return packed[1].decode()


# A process that has only what `answers` has.
WORKER = """
import json, os, sys
from fiberexec._bundle import install
answers = sys.argv[1]
seconds = []
def ask(name):
    with open(os.path.join(answers, "asked"), "a") as log:
        log.write(name + "\\n")
    try:
        with open(os.path.join(answers, name + ".digest")) as file:
            digest = file.read()
    except FileNotFoundError:
        return None
    with open(os.path.join(answers, name + ".data"), "rb") as file:
        return digest, file.read()
heavy = {"zipfile", "hashlib", "shutil", "tempfile", "inspect", "typing", "logging"} & set(sys.modules)
folder = os.path.join(answers, "code")
finder = install(ask, folder, image="registry/image:1", excuse=seconds.append)
"""


def answer(tmp_path: Path, *modules: str, folder: str = "answers") -> Path:
    """Let workers be answered as the driver would answer them for these modules."""
    answers = tmp_path / folder
    answers.mkdir(exist_ok=True)
    for name in modules:
        found = bundle(name)
        if found is not None:
            (answers / f"{name}.digest").write_text(found[0])
            (answers / f"{name}.data").write_bytes(found[1])
    return answers


def run_worker(tmp_path: Path, code: str, *modules: str, wait: bool = True, folder: str = "answers", env: Any = None) -> Any:
    answers = answer(tmp_path, *modules, folder=folder)
    program = subprocess.Popen(
        [sys.executable, "-c", WORKER + textwrap.dedent(code), str(answers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(_install.__file__).parents[2], env=env,
    )  # fmt: skip
    if not wait:
        return program
    out, err = program.communicate(timeout=60)
    return subprocess.CompletedProcess([], program.returncode, out, err)


def asked(tmp_path: Path) -> list[str]:
    path = tmp_path / "answers" / "asked"
    return path.read_text().split() if path.exists() else []
