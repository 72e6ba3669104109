"""A worker that lacks modules: what it asks for, and what it is told."""

from __future__ import annotations

import os
from pathlib import Path

from .helpers import answer, asked, put, run_worker


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
    answer(tmp_path, "crowd_pkg")  # once: workers read it while others start
    code = "import crowd_pkg.m199; print(crowd_pkg.m199.x)"
    crowd = [run_worker(tmp_path, code, wait=False) for _ in range(6)]
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
