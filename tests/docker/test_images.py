"""Which image is run where none is named, and how it is made."""

from __future__ import annotations

import configparser
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import services

from fiberexec import ConfigError, __version__
from fiberexec.backends import _images
from fiberexec.backends._images import Recipe, find

from .conftest import Place, docker

ROOT = Path(__file__).parents[2]
PYTHON = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder that nothing above it belongs to."""
    folder = tmp_path / "My Project"
    folder.mkdir()
    (folder / ".git").mkdir()
    return folder


def text(recipe: Recipe, name: str = "Dockerfile") -> str:
    assert recipe.files is not None
    return recipe.files[name].decode()


def test_the_nearest_folder_that_says_something_counts(project: Path) -> None:
    deep = project / "a" / "b"
    deep.mkdir(parents=True)
    (project / "requirements.txt").write_text("numpy\n")
    assert find(str(deep)).source == str(project / "requirements.txt")
    (project / "a" / "Dockerfile").write_text("FROM scratch\n")
    assert find(str(deep)).source == str(project / "a" / "Dockerfile")


def test_a_dockerfile_comes_before_requirements_and_those_before_a_pyproject(project: Path) -> None:
    (project / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["numpy>=1"]\n')
    assert text(find(str(project)), "requirements.txt") == "numpy>=1\n"
    (project / "requirements.txt").write_text("scipy\n")
    assert text(find(str(project)), "requirements.txt") == "scipy\n"
    (project / "Dockerfile").write_text("FROM scratch\n")
    assert find(str(project)) == Recipe(str(project / "Dockerfile"), str(project), "Dockerfile", None)


def test_without_any_there_is_a_dockerfile_to_paste(project: Path) -> None:
    (project / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")  # says nothing about the project
    with pytest.raises(ConfigError) as caught:
        find(str(project))
    assert f"    FROM python:{PYTHON}-slim\n    RUN pip install fiberexec=={__version__}\n" in str(caught.value)
    assert str(project) in str(caught.value) and "image=" in str(caught.value)
    with pytest.raises(ConfigError, match=r'RUN pip install "fiberexec\[docker\]=='):
        find(str(project), extra="docker")  # as a program needs it that starts workers of its own


def test_a_dockerfile_can_be_named(project: Path) -> None:
    (project / "docker").mkdir()
    (project / "docker" / "Worker").write_text("FROM scratch\n")
    recipe = find(str(project), "docker/Worker")
    assert (recipe.folder, recipe.dockerfile) == (str(project / "docker"), "Worker")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere"):
        find(str(project), "nowhere")


def test_requirements_are_taken_with_what_they_include_and_without_the_projects_own(project: Path) -> None:
    (project / "more.txt").write_text("# more\nscipy ; python_version > '3'\n-r requirements.txt\n")
    (project / "requirements.txt").write_text("-r more.txt\n\nnumpy \\\n  >=1\n-e .\n./local\nfile:///x\n-e ../other\n--pre\n")
    lines = text(find(str(project)), "requirements.txt").splitlines()
    assert [" ".join(line.split()) for line in lines] == ["scipy ; python_version > '3'", "numpy >=1", "--pre"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("requirements.txt", "-r missing.txt\n", "cannot read .*missing.txt"),
        ("requirements.txt", "-c constraints.txt\n", "takes no constraints"),
        ("pyproject.toml", "[project\n", "cannot read"),
        ("pyproject.toml", '[project]\nname = "x"\ndynamic = ["dependencies"]\n', "pip freeze > requirements.txt"),
        ("pyproject.toml", '[project]\ndependencies = "numpy"\n', "must be a list of str"),
    ],
)
def test_what_cannot_be_made_an_image_of_is_an_error(name: str, content: str, said: str, project: Path) -> None:
    (project / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        find(str(project))


def test_a_generated_image_starts_from_the_drivers_python_and_holds_the_drivers_fiberexec(project: Path) -> None:
    (project / "requirements.txt").write_text("numpy\n")
    recipe = find(str(project), base="my/base:1", arguments={"PIP_INDEX_URL": "x"})
    assert text(recipe).startswith("FROM my/base:1\nARG PIP_INDEX_URL\n")
    assert text(find(str(project))).startswith(f"FROM python:{PYTHON}-slim\n")
    assert recipe.files is not None
    [wheel] = [data for name, data in recipe.files.items() if name.endswith(".whl")]
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        assert archive.read("fiberexec/_errors.py") == (Path(_images.fiberexec.__file__).parent / "_errors.py").read_bytes()
        assert not [name for name in archive.namelist() if "__pycache__" in name]
    with tarfile.open(fileobj=_images.context(recipe)) as files:
        assert sorted(files.getnames()) == sorted(recipe.files)


def test_requirements_with_hashes_stay_apart_from_what_a_program_needs_to_start_workers(project: Path) -> None:
    """Where one has a hash, pip wants one of each."""
    (project / "requirements.txt").write_text("numpy==2.0 --hash=sha256:0\n")
    recipe = find(str(project), extra="kubernetes")
    assert text(recipe, "requirements.txt") == "numpy==2.0 --hash=sha256:0\n"
    assert text(recipe).endswith("-py3-none-any.whl 'kubernetes>=31'\n")
    assert recipe.tag() != find(str(project)).tag()


def test_what_fiberexec_requires_is_what_its_metadata_says() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = parser["options"]["install_requires"].split("\n")
    assert sorted(_images.NEEDS) == sorted(line for line in wanted if line)
    for extra, requirement in _images.EXTRAS.items():
        assert requirement in parser["options.extras_require"][extra]


# -- tags


def test_a_tag_is_the_same_until_something_changes(project: Path) -> None:
    pytest.importorskip("docker")
    (project / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (project / "data").write_text("1")
    (project / ".dockerignore").write_text("# what stays here\n.git\n*.tmp\n")
    tag = find(str(project)).tag()
    assert tag.startswith("fiberexec-my-project:") and find(str(project)).tag() == tag
    os.utime(project / "data", (1, 1))
    (project / "x.tmp").write_text("ignored")
    assert find(str(project)).tag() == tag
    (project / "data").chmod(0o700)
    changed = {tag, find(str(project)).tag()}
    (project / "data").write_text("2")
    changed.add(find(str(project)).tag())
    (project / "link").symlink_to("data")
    changed.add(find(str(project)).tag())
    (project / "empty").mkdir()
    changed.add(find(str(project)).tag())
    (project / "Dockerfile").write_text("FROM scratch\nCOPY . /x\n")
    changed.add(find(str(project)).tag())
    assert len(changed) == 6


def test_other_arguments_or_another_kind_of_machine_make_another_tag(project: Path) -> None:
    (project / "Dockerfile").write_text("FROM scratch\nARG A\n")

    def tag(**arguments: str) -> str:
        return find(str(project), arguments=arguments).tag()

    assert tag(A="1", B="2") == tag(B="2", A="1")
    tags = {tag(), tag(A="1"), tag(A="2"), tag(A="1", B="2"), find(str(project)).tag("linux/arm64")}
    tags |= {find(str(project), "Dockerfile", arguments={"A": "3"}).tag()}
    assert len(tags) == 6


def test_a_generated_images_tag_is_the_same_in_every_process(project: Path) -> None:
    (project / "requirements.txt").write_text("numpy\n")
    code = f"from fiberexec.backends._images import find; print(find({str(project)!r}).tag())"
    tags = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert tags == {find(str(project)).tag()}
    (project / "requirements.txt").write_text("scipy\n")
    assert find(str(project)).tag() not in tags


# -- on a real engine


def test_a_project_with_a_dockerfile_is_built_once(
    project: Path, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "hello").write_text("hello")
    (project / "Dockerfile").write_text(f"FROM {services.bare_image()}\nCOPY hello /hello\n")
    monkeypatch.chdir(project)
    one = place(image=None)
    try:
        assert one.end(one.start(1, "print(open('/hello').read())")).log == "hello\n"
        assert f"from {project / 'Dockerfile'}" in caplog.text
        caplog.clear()
        again = place(image=None)
        assert again.end(again.start(1, "print(open('/hello').read())")).log == "hello\n"
        assert caplog.text == ""  # it was there
    finally:
        docker("image", "rm", "-f", find(str(project)).tag())


def test_a_project_with_requirements_gets_an_image_that_works(
    project: Path, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = services.bare_image(None, *(line for line in _images.NEEDS if "tomli" not in line))  # so the build needs no network
    (project / "requirements.txt").write_text("dill\n")
    monkeypatch.chdir(project)
    one = place(image=None, backend_options={"base_image": base})
    try:
        code = "import fiberexec, fiberexec._agent, importlib.metadata as m; print(m.version('fiberexec'))"
        assert one.end(one.start(1, code)).log == f"{__version__}\n"
    finally:
        recipe = find(str(project), base=base)
        docker("image", "rm", "-f", recipe.tag())


@pytest.mark.parametrize(
    ("line", "said"),
    [("RUN echo something is wrong; exit 5", "something is wrong"), ("RUN --mount=type=cache,target=/x true", "BuildKit")],
)
def test_a_build_that_fails_shows_its_last_lines(
    line: str, said: str, project: Path, place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiberexec import LaunchError

    (project / "Dockerfile").write_text(f"FROM {services.bare_image()}\n{line}\n")
    monkeypatch.chdir(project)
    one = place(image=None)
    with pytest.raises(LaunchError, match=said) as caught:
        one.start(1, "pass")
    assert caught.value.final and "What to do: " in str(caught.value)
