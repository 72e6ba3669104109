"""Code and files of the driver's host, on hosts that have neither."""

from __future__ import annotations

import importlib
import importlib.machinery
import io
import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec._bundle import _archive, _install, _modules, bundle, check_ship, install, ship, unpack
from fiberexec._errors import ConfigError


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())


@pytest.fixture
def src(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, on the driver's sys.path."""
    folder = tmp_path / "src"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    _modules._projects.cache_clear()
    yield folder
    _modules._projects.cache_clear()


def names(packed: tuple[str, bytes] | None) -> dict[str, bytes]:
    assert packed is not None
    assert packed[0], packed[1].decode()
    with zipfile.ZipFile(io.BytesIO(packed[1])) as archive:
        return {one: archive.read(one) for one in archive.namelist()}


def reason(packed: tuple[str, bytes] | None) -> str:
    assert packed is not None
    assert packed[0] == "", "it was sent"
    return packed[1].decode()


# -- driver: what is sent


def test_a_module_is_found_without_being_imported(src: Path) -> None:
    put(src, {"lonely_mod.py": "raise RuntimeError('imported')"})
    assert names(bundle("lonely_mod")) == {"lonely_mod.py": b"raise RuntimeError('imported')"}
    assert "lonely_mod" not in sys.modules


def test_a_package_goes_with_its_data_and_without_its_caches(src: Path) -> None:
    put(
        src / "pack_a",
        {
            "__init__.py": "", "deep/__init__.py": "", "deep/m.py": "x = 1", "data/table.csv": "1,2", "py.typed": "",
            "__pycache__/m.pyc": b"0", ".git/config": "secret", ".venv/lib/x.py": "", "env/pyvenv.cfg": "", "env/y.py": "",
        },
    )  # fmt: skip
    expected = ["__init__.py", "data/table.csv", "deep/__init__.py", "deep/m.py", "py.typed"]
    assert sorted(names(bundle("pack_a"))) == [f"pack_a/{name}" for name in expected]


def test_a_package_without_init_goes_as_its_folders_of_code(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    monkeypatch.syspath_prepend(str(other))
    put(src / "space_ns", {"one/a.py": "", "one/a.json": "{}", "huge/data.bin": b"0", "two/three/b.py": ""})
    put(other / "space_ns", {"four/c.py": ""})
    importlib.invalidate_caches()
    expected = ["four/c.py", "one/a.json", "one/a.py", "two/three/b.py"]
    assert sorted(names(bundle("space_ns"))) == [f"space_ns/{name}" for name in expected]


def test_a_folder_of_data_is_no_package(src: Path) -> None:
    put(src / "only_data", {"a.csv": "1", "sub/b.csv": "2"})
    assert bundle("only_data") is None


def test_what_is_loaded_wins_over_what_would_be_found(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(src, {"twice_mod.py": "which = 1"})
    importlib.import_module("twice_mod")
    try:
        put(tmp_path / "before", {"twice_mod.py": "which = 2"})
        monkeypatch.syspath_prepend(str(tmp_path / "before"))
        assert names(bundle("twice_mod")) == {"twice_mod.py": b"which = 1"}
    finally:
        del sys.modules["twice_mod"]


def test_an_edited_module_is_noticed_whatever_its_size_and_time(src: Path) -> None:
    path = src / "edited_mod.py"
    put(src, {"edited_mod.py": "x = 1"})
    first = bundle("edited_mod")
    old = path.stat()
    path.write_text("x = 2")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert names(bundle("edited_mod")) == {"edited_mod.py": b"x = 2"}
    path.write_text("x = 1")
    assert bundle("edited_mod") == first


def test_an_unchanged_package_is_not_read_again(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(src, {"calm_mod.py": "x = 1"})
    monkeypatch.setattr(_archive, "_SETTLED", -(10**12))
    first = bundle("calm_mod")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    again = bundle("calm_mod")
    assert first is not None and again is not None and again[1] is first[1]


def test_equal_content_has_equal_bytes_wherever_and_whenever(src: Path, tmp_path: Path) -> None:
    made: list[Any] = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        put(folder, {"conf/b": "2", "conf/a": "1"})
        os.utime(folder / "conf" / "a", (len(made), 10**9))
        files: Any = {}
        _archive.collect(str(folder), "", files, [])
        made.append(_archive.pack(folder, files, {}, strict=True))
    assert made[0] == made[1]
    put(tmp_path / "y", {"conf/a": "3"})
    files = {}
    _archive.collect(str(tmp_path / "y"), "", files, [])
    assert _archive.pack("y", files, {}, strict=True)[0] != made[0][0]


@pytest.mark.parametrize("name", ["json", "os", "sys", "_thread", "__main__", "no_such_module_here", "../etc", "a.b", ""])
def test_what_the_driver_does_not_send_either(name: str) -> None:
    assert bundle(name) is None


def test_an_installed_package_stays_and_the_answer_has_its_name_and_version_at_pip() -> None:
    from importlib.metadata import version

    said = reason(bundle("_pytest"))
    assert f"RUN pip install pytest=={version('pytest')}" in said
    assert "pytest" in reason(bundle("pytest"))


def test_a_symlink_in_site_packages_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    put(tmp_path / "store", {"stored_mod.py": ""})
    site.mkdir()
    (site / "stored_mod.py").symlink_to(tmp_path / "store" / "stored_mod.py")
    monkeypatch.syspath_prepend(str(site))
    assert "pip install stored_mod" in reason(bundle("stored_mod"))


def test_what_is_compiled_for_this_host_stays(src: Path) -> None:
    put(src / "fast_pkg", {"__init__.py": "", "core.cpython-311-x86_64-linux-gnu.so": b"ELF"})
    put(src, {"bare_ext.abi3.so": b"ELF"})
    for name in "fast_pkg", "bare_ext":
        said = reason(bundle(name))
        assert "compiled" in said and ".so" in said and "Dockerfile" in said


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("odd metadata")])
def test_whatever_goes_wrong_the_worker_gets_an_answer(src: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any) -> None:
        raise error

    put(src, {"vanishing_mod.py": ""})
    monkeypatch.setattr(_modules, "collect", fail)
    assert str(error) in reason(bundle("vanishing_mod"))


def test_what_is_in_an_archive_stays_and_the_answer_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "app.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("zipped_mod.py", "")
    monkeypatch.syspath_prepend(str(path))
    assert str(path) in reason(bundle("zipped_mod"))


def test_links_are_followed_but_not_in_circles(src: Path, tmp_path: Path) -> None:
    put(src / "linked", {"__init__.py": "", "sub/m.py": ""})
    put(tmp_path, {"far/away.txt": "far"})
    (src / "linked" / "data").symlink_to(tmp_path / "far")
    (src / "linked" / "sub" / "up").symlink_to(src / "linked")
    (src / "linked" / ".#lock").symlink_to("nobody@nowhere")
    os.mkfifo(src / "linked" / "fifo")
    expected = ["__init__.py", "data/away.txt", "sub/m.py"]
    assert sorted(names(bundle("linked"))) == [f"linked/{name}" for name in expected]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read, by root either")
def test_an_unreadable_file_of_a_package_is_left_out_and_one_of_ship_is_an_error(src: Path) -> None:
    put(src / "torn", {"__init__.py": "", "m.py": ""})
    (src / "torn" / "mem").symlink_to("/proc/self/mem")
    assert sorted(names(bundle("torn"))) == ["torn/__init__.py", "torn/m.py"]
    with pytest.raises(ConfigError, match="cannot be read"):
        ship([str(src / "torn")])


def test_names_that_are_not_utf8_do_not_stop_a_package(src: Path) -> None:
    put(src / "odd_names", {"__init__.py": ""})
    with open(os.fsencode(src / "odd_names") + b"/\xff.txt", "w"):
        pass
    assert list(names(bundle("odd_names"))) == ["odd_names/__init__.py"]
    with pytest.raises(ConfigError, match="UTF-8"):
        check_ship([str(src / "odd_names")])


def test_a_huge_package_names_its_largest_files(src: Path) -> None:
    put(src / "huge_pkg", {"__init__.py": ""})
    for name, size in ("small.bin", 2**20), ("big.bin", 150 * 2**20), ("bigger.bin", 160 * 2**20):
        with open(src / "huge_pkg" / name, "wb") as file:
            file.truncate(size)
    said = reason(bundle("huge_pkg"))
    assert "311 MiB" in said and "200 MiB" in said
    assert said.index("bigger.bin (160 MiB)") < said.index("/big.bin (150 MiB)")


def test_a_package_of_very_many_files_is_given_up(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_archive, "MOST_FILES", 5)
    put(src / "many", {"__init__.py": "", **{f"f{n}": "" for n in range(5)}})
    assert "more than 5 files" in reason(bundle("many"))


def distribution(site: Path, name: str, **files: str) -> None:
    put(site / f"{name}-1.2.dist-info", {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", **files})


def test_an_editable_install_through_pth_goes_with_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, site = tmp_path / "my project", tmp_path / "venv" / "site-packages"
    put(project / "src" / "edit_pkg", {"__init__.py": "from importlib.metadata import version; v = version('edit-pkg')"})
    put(site, {"__editable__.pth": str(project / "src")})
    url = json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}})
    distribution(site, "edit-pkg", **{"direct_url.json": url, "entry_points.txt": "[console_scripts]\nx = edit_pkg:v\n"})
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(project / "src"))  # as site.py does with the .pth
    packed = names(bundle("edit_pkg"))
    assert set(packed) == {
        "edit_pkg/__init__.py", "edit_pkg-1.2.dist-info/METADATA", "edit_pkg-1.2.dist-info/entry_points.txt"
    }  # fmt: skip
    assert run_worker(tmp_path, "import edit_pkg; print(edit_pkg.v)", "edit_pkg").stdout == "1.2\n"


def test_an_editable_install_through_a_finder_goes(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "elsewhere" / "real_name", {"__init__.py": "", "m.py": "x = 5"})

    class EditableFinder:  # as setuptools makes one
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            from importlib.util import spec_from_file_location

            if fullname == "found_pkg":
                init = tmp_path / "elsewhere" / "real_name" / "__init__.py"
                return spec_from_file_location(fullname, init, submodule_search_locations=[str(init.parent)])
            return None

    class Broken:
        def find_spec(self, *args: Any) -> Any:
            raise RuntimeError("its own trouble")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path, EditableFinder])
    assert sorted(names(bundle("found_pkg"))) == ["found_pkg/__init__.py", "found_pkg/m.py"]
    assert bundle("no_such_module_here") is None


def test_an_editable_install_of_a_part_of_a_namespace_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"real/part/__init__.py": "", "real/part/m.py": "x = 5", "real/loose.py": ""})
    finder_module = type(sys)("__editable___some_finder")  # as setuptools makes one
    vars(finder_module)["MAPPING"] = {
        "found_ns.part": str(tmp_path / "real" / "part"),
        "found_ns.loose": str(tmp_path / "real" / "loose"),
        "found_ns_other": str(tmp_path / "real"),
    }
    monkeypatch.setitem(sys.modules, finder_module.__name__, finder_module)

    class EditableFinder:
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            if fullname != "found_ns":
                return None
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = ["__editable__.some.finder.__path_hook__"]
            return spec

    EditableFinder.__module__ = finder_module.__name__
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, EditableFinder])
    assert sorted(names(bundle("found_ns"))) == ["found_ns/loose.py", "found_ns/part/__init__.py", "found_ns/part/m.py"]


# -- ship


def test_ship_keeps_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path,
        {"w/data.csv": "1", "w/conf/a.yaml": "a", "w/conf/x/b": "b", "w/deep/er/f": "f", "out.txt": "o", "abs/g": "g"},
    )
    (tmp_path / "w" / "conf" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    paths: list[str | Path] = ["data.csv", "conf/", "./deep/er/f", "../out.txt", str(tmp_path / "abs"), Path("conf")]
    check_ship(paths)
    packed = names(ship(paths))
    assert sorted(packed) == ["abs/g", "conf/a.yaml", "conf/empty/", "conf/x/b", "data.csv", "deep/er/f", "out.txt"]
    assert packed["conf/a.yaml"] == b"a"


def test_ship_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a.txt": "", "b/c.txt": "", ".git/config": ""})
    monkeypatch.chdir(tmp_path)
    assert sorted(names(ship(["."]))) == ["a.txt", "b/c.txt"]


def test_ship_of_nothing() -> None:
    check_ship([])
    assert names(ship([])) == {}


def test_ship_sends_what_it_is_told_compiled_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"lib.so": b"ELF"})
    monkeypatch.chdir(tmp_path)
    assert names(ship(["lib.so"])) == {"lib.so": b"ELF"}


def test_check_ship_names_the_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'no\.csv'.*current folder is"):
        check_ship(["no.csv"])


def test_check_ship_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    put(tmp_path, {"a/f": "1", "b/f": "2"})
    with pytest.raises(ConfigError, match="would both be 'f'"):
        check_ship([str(tmp_path / "a" / "f"), str(tmp_path / "b" / "f")])


def test_check_ship_refuses_what_is_too_large_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(300 * 2**20)
    monkeypatch.setattr(_archive, "open", None, raising=False)
    with pytest.raises(ConfigError, match=r"300 MiB.*big\.bin"):
        check_ship([str(tmp_path / "big.bin")])


def test_check_ship_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a file or a folder"):
        check_ship([str(tmp_path / "pipe")])


# -- worker: a process that has only what `answers` has

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


def run_worker(tmp_path: Path, code: str, *modules: str, wait: bool = True, folder: str = "answers", env: Any = None) -> Any:
    answers = tmp_path / folder
    answers.mkdir(exist_ok=True)
    for name in modules:
        answer = bundle(name)
        if answer is not None:
            (answers / f"{name}.digest").write_text(answer[0])
            (answers / f"{name}.data").write_bytes(answer[1])
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


def test_a_worker_imports_modules_packages_and_data_of_the_driver(src: Path, tmp_path: Path) -> None:
    put(src / "big_pkg", {"__init__.py": "from .sub import deep", "sub/__init__.py": "", "sub/deep.py": "import helper_mod"})
    put(src / "big_pkg", {"table.csv": "1,2"})
    put(src, {"helper_mod.py": "value = 42"})
    done = run_worker(
        tmp_path,
        """
        import big_pkg.sub.deep, pkgutil
        print(big_pkg.deep.helper_mod.value, pkgutil.get_data("big_pkg", "table.csv").decode())
        print(len(seconds), seconds[::2], all(s > 0 for s in seconds[1::2]), sum(p.startswith(answers) for p in sys.path))
        """,
        "big_pkg",
        "helper_mod",
    )
    assert done.stdout == "42 1,2\n4 [None, None] True 2\n", done.stderr
    assert asked(tmp_path) == ["big_pkg", "helper_mod"]


def test_a_worker_asks_for_a_name_once_and_never_for_what_python_has(tmp_path: Path) -> None:
    done = run_worker(
        tmp_path,
        """
        import importlib.util
        for _ in range(3):
            assert importlib.util.find_spec("not_there") is None
            try:
                import not_there
            except ImportError as error:
                assert type(error) is ModuleNotFoundError and error.name == "not_there"
            try:
                import json.not_there
            except ImportError as error:
                assert error.name == "json.not_there"
            try:
                import _gdbm_
            except ImportError:
                pass
            try:
                import _winapi
            except ImportError as error:
                assert str(error) == "No module named '_winapi'", error
            try:
                __import__("../x")
            except ImportError:
                pass
        importlib.invalidate_caches()
        importlib.util.find_spec("not_there")
        print("done")
        """,
    )
    assert done.stdout == "done\n", done.stderr
    assert asked(tmp_path) == ["not_there", "_gdbm_", "not_there"]


def test_the_error_names_the_module_the_image_and_the_line_to_add(src: Path, tmp_path: Path) -> None:
    put(src / "fast_pkg", {"__init__.py": "", "core.so": b"ELF"})
    done = run_worker(
        tmp_path,
        """
        for name in "_pytest", "fast_pkg", "not_there":
            finder._missing.pop(name, None)
            sys.path[:] = [p for p in sys.path if p and "site-packages" not in p]
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                print(error.name, "|", str(error).replace(os.uname().nodename, "HOST"))
        """,
        "_pytest",
        "fast_pkg",
    )
    one, rest = done.stdout.split("\nfast_pkg |")
    two, three = rest.split("\nnot_there |")
    begin = "No module named '{}': image 'registry/image:1', on host HOST, has none; "
    assert one.startswith("_pytest | " + begin.format("_pytest")), done.stderr
    assert "    RUN pip install pytest==" in one
    assert begin.format("fast_pkg") in two and "core.so" in two and "RUN pip install /src" in two
    assert begin.format("not_there") in three and "    RUN pip install not_there" in three


def test_unpickling_a_function_of_a_missing_module_says_the_same(tmp_path: Path) -> None:
    done = run_worker(
        tmp_path,
        """
        from fiberexec._serialize import dump_exception, load_exception, loads
        try:
            loads(b"cnot_there\\nf\\n.")
        except Exception as error:
            back = load_exception(dump_exception(error))
            print(type(back).__name__, back.name, "pip install not_there" in str(back))
        """,
    )
    assert done.stdout == "ModuleNotFoundError not_there True\n", done.stderr


def test_parts_of_a_namespace_that_the_image_has_are_joined_by_the_drivers(src: Path, tmp_path: Path) -> None:
    put(src / "corp_ns", {"mine/__init__.py": "from corp_ns.theirs import y", "loose.py": "z = 3"})
    put(tmp_path / "image" / "corp_ns", {"theirs/__init__.py": "y = 2"})
    done = run_worker(
        tmp_path,
        f"""
        sys.path.insert(0, {str(tmp_path / "image")!r})
        import corp_ns.theirs
        import corp_ns.mine
        from corp_ns import loose
        print(corp_ns.mine.y, loose.z)
        """,
        "corp_ns",
    )
    assert done.stdout == "2 3\n", done.stderr
    assert asked(tmp_path) == ["corp_ns"]


def test_what_the_image_has_is_not_asked_for(src: Path, tmp_path: Path) -> None:
    put(src, {"both_mod.py": "where = 'driver'"})
    put(tmp_path / "image", {"both_mod.py": "where = 'image'"})
    done = run_worker(
        tmp_path,
        f"sys.path.insert(0, {str(tmp_path / 'image')!r}); import both_mod; print(both_mod.where)",
        "both_mod",
    )
    assert done.stdout == "image\n", done.stderr
    assert asked(tmp_path) == []


def test_workers_of_one_host_ask_once_together(src: Path, tmp_path: Path) -> None:
    put(src / "crowd_pkg", {"__init__.py": "", **{f"m{n}.py": f"x = {n}" for n in range(200)}})
    bundle_code = "import crowd_pkg.m199; print(crowd_pkg.m199.x)"
    crowd = [run_worker(tmp_path, bundle_code, "crowd_pkg", wait=False) for _ in range(6)]
    for one in crowd:
        out, err = one.communicate(timeout=60)
        assert out == "199\n", err
    assert asked(tmp_path) == ["crowd_pkg"]
    folders = [name for name in os.listdir(tmp_path / "answers" / "code") if name != ".names"]
    assert len(folders) == 1 and len(folders[0]) == 64


def test_a_worker_that_is_killed_while_it_asks_leaves_the_others_unharmed(src: Path, tmp_path: Path) -> None:
    put(src, {"late_mod.py": "x = 7"})
    first = run_worker(
        tmp_path,
        """
        import signal
        def stuck(name):
            print("asking", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        finder._ask = stuck
        import late_mod
        """,
        wait=False,
    )
    assert first.stdout.readline() == "asking\n"
    second = run_worker(tmp_path, "import late_mod; print(late_mod.x)", "late_mod", wait=False)
    first.kill()
    first.communicate(timeout=60)
    out, err = second.communicate(timeout=60)
    assert out == "7\n", err


def test_a_failure_to_ask_is_an_import_error_and_is_tried_again(src: Path, tmp_path: Path) -> None:
    put(src, {"shaky_mod.py": "x = 8"})
    done = run_worker(
        tmp_path,
        """
        good, finder._ask = finder._ask, lambda name: 1 / 0
        try:
            import shaky_mod
        except ImportError as error:
            print(error.name, "ZeroDivisionError" in str(error), type(error.__cause__).__name__)
        finder._ask = good
        import shaky_mod
        print(shaky_mod.x, len(seconds))
        """,
        "shaky_mod",
    )
    assert done.stdout == "shaky_mod True ZeroDivisionError\n8 4\n", done.stderr


def test_what_asking_itself_imports_is_not_asked_for(tmp_path: Path) -> None:
    done = run_worker(
        tmp_path,
        """
        def ask(name):
            try:
                import optional_part
            except ImportError as error:
                print(name, error)
        finder._ask = ask
        try:
            import not_there
        except ImportError:
            print("over")
        """,
    )
    assert done.stdout == "not_there No module named 'optional_part'\nover\n", done.stderr


def test_installing_again_replaces_and_installing_is_light(tmp_path: Path) -> None:
    done = run_worker(
        tmp_path,
        """
        count = len(sys.meta_path)
        other = install(ask, "elsewhere")
        print(len(sys.meta_path) - count, sys.meta_path[-1] is other, finder in sys.meta_path, sorted(heavy))
        """,
    )
    assert done.stdout == "0 True False []\n", done.stderr


def test_threads_of_a_worker_import_one_package_together(src: Path, tmp_path: Path) -> None:
    put(src / "thread_pkg", {"__init__.py": "", "a.py": "x = 1", "b.py": "x = 2"})
    done = run_worker(
        tmp_path,
        """
        import importlib, threading
        start, found = threading.Barrier(8), []
        def go(name):
            start.wait()
            found.append(importlib.import_module(name).x)
        crowd = [threading.Thread(target=go, args=(f"thread_pkg.{'ab'[n % 2]}",)) for n in range(8)]
        [one.start() for one in crowd]
        [one.join() for one in crowd]
        print(sorted(found))
        """,
        "thread_pkg",
    )
    assert done.stdout == "[1, 1, 1, 1, 2, 2, 2, 2]\n", done.stderr
    assert asked(tmp_path) == ["thread_pkg"]


# -- unpacking


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return buffer.getvalue()


DIGEST = "ab" * 32


def test_unpacking_keeps_content_folders_and_executable_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"w/run.sh": "#!/bin/sh", "w/conf/a": "1"})
    (tmp_path / "w" / "run.sh").chmod(0o700)
    (tmp_path / "w" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    digest, data = ship(["."])
    place = Path(unpack(digest, data, str(tmp_path / "there")))
    assert place == tmp_path / "there" / digest
    assert (place / "conf" / "a").read_text() == "1" and (place / "empty").is_dir()
    assert stat.S_IMODE((place / "run.sh").stat().st_mode) == 0o755
    assert unpack(digest, b"not looked at", str(tmp_path / "there")) == str(place)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "a//b", "./a"])
def test_a_name_that_leads_out_of_the_folder_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    data = archive(good=b"1", **{name: b"2"})
    with pytest.raises(ValueError, match="outside"):
        unpack(DIGEST, data, str(tmp_path / "code"))
    assert os.listdir(tmp_path / "code") == [] and os.listdir(tmp_path) == ["code"]


@pytest.mark.parametrize("digest", ["", "..", "../" * 21 + "x", "AB" * 32, "ab" * 31])
def test_what_is_no_digest_is_no_folder(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digest"):
        unpack(digest, archive(a=b""), str(tmp_path / "code"))


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    data = bytearray(archive(good=b"1" * 1000))
    data[200] ^= 1
    with pytest.raises(zipfile.BadZipFile):
        unpack(DIGEST, bytes(data), str(tmp_path / "code"))
    assert os.listdir(tmp_path / "code") == []


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made, made.open("zeros", "w") as file:
        for _ in range(257):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="too large"):
        unpack(DIGEST, buffer.getvalue(), str(tmp_path / "code"))


def test_unpacking_in_many_threads_at_once_gives_one_whole_folder(tmp_path: Path) -> None:
    data = archive(**{f"d{n}/f": b"%d" % n for n in range(100)})
    failed: list[BaseException] = []
    start = threading.Barrier(6)

    def go() -> None:
        start.wait()
        try:
            place = unpack(DIGEST, data, str(tmp_path / "code"))
            assert all((Path(place) / f"d{n}" / "f").read_bytes() == b"%d" % n for n in range(100))
        except BaseException as error:
            failed.append(error)

    crowd = [threading.Thread(target=go) for _ in range(6)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert not failed and os.listdir(tmp_path / "code") == [DIGEST]


def test_install_puts_its_finder_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    finder = install(lambda name: None, str(tmp_path))
    assert sys.meta_path[-1] is finder
