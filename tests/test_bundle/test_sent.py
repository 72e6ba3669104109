"""What the driver sends of its own code, and what it says instead."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fiberexec._bundle import _archive, _modules, bundle, check_ship, ship
from fiberexec._errors import ConfigError

from .helpers import names, put, reason, run_worker


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
