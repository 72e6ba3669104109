"""Settings: arguments beat variables beat files beat defaults; what is wrong is refused, with its source."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from fiberexec._config import CHECKS, Settings, check, load
from fiberexec._errors import ConfigError, FiberError

MIB = 1 << 20


def values(settings: Settings) -> dict[str, object]:
    """The settings without their sources."""
    return {name: getattr(settings, name) for name in CHECKS}


DEFAULTS = values(Settings())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without settings in it."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_without_anything_all_values_are_defaults() -> None:
    settings = load()
    assert values(settings) == DEFAULTS
    assert settings.sources == dict.fromkeys(CHECKS, "default")
    assert (settings.backend, settings.max_worker_losses, settings.startup_timeout) == ("local", 3, 600)
    assert settings.idle_timeout is ...


def test_every_field_has_a_check_and_every_check_a_field() -> None:
    assert Settings._fields == (*CHECKS, "sources")


def test_arguments_beat_variables_beat_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fiberexec.toml"
    path.write_text("max_workers = 2\ntimeout = 5\ngpu = 1\n")
    monkeypatch.setenv("FIBEREXEC_MAX_WORKERS", "3")
    monkeypatch.setenv("FIBEREXEC_TIMEOUT", "6.5")
    settings = load(max_workers=4)
    assert (settings.max_workers, settings.timeout, settings.gpu) == (4, 6.5, 1)
    assert settings.sources["max_workers"] == "argument"
    assert settings.sources["timeout"] == "FIBEREXEC_TIMEOUT"
    assert settings.sources["gpu"] == str(path)
    assert settings.sources["cpu"] == "default"


def test_none_and_ellipsis_are_arguments_not_given_but_an_idle_timeout_of_none_is_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FIBEREXEC_IDLE_TIMEOUT", "7")
    monkeypatch.setenv("FIBEREXEC_CPU", "2")
    assert load(cpu=None, idle_timeout=...).idle_timeout == 7
    assert load(cpu=None).cpu == 2
    assert load(idle_timeout=None).idle_timeout is None
    monkeypatch.setenv("FIBEREXEC_IDLE_TIMEOUT", "never")
    assert load().idle_timeout is None


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("BACKEND", "local", "backend", "local"),
        ("MAX_WORKERS", "12", "max_workers", 12),
        ("CPU", "500m", "cpu", 0.5),
        ("MEMORY", "512", "memory", 512 * MIB),
        ("MEMORY", "4Gi", "memory", 4096 * MIB),
        ("PREFIX_OUTPUT", "YES", "prefix_output", True),
        ("PREFIX_OUTPUT", "0", "prefix_output", False),
        ("ENV", '{"A": "1"}', "env", {"A": "1"}),
        ("SHIP", os.pathsep.join(["data", "model.bin"]), "ship", ("data", "model.bin")),
        ("BACKEND_OPTIONS", '{"partition": "gpu"}', "backend_options", {"partition": "gpu"}),
    ],
)
def test_a_variable_is_read_as_its_setting(
    variable: str, text: str, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FIBEREXEC_{variable}", text)
    assert getattr(load(), name) == value


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_MAX_WORKERS", "")
    assert values(load()) == DEFAULTS


def test_the_nearest_file_upward_wins_alone(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "fiberexec.toml").write_text("max_workers = 1\ncpu = 1\n")
    (elsewhere.parent / "pyproject.toml").write_text("[tool.fiberexec]\nmax_workers = 2\n")
    assert (load().max_workers, load().cpu) == (2, None)
    (elsewhere / "fiberexec.toml").write_text("max_workers = 3\n")
    assert load().max_workers == 3


def test_a_pyproject_without_our_table_is_passed_over(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "fiberexec.toml").write_text("max_workers = 1\n")
    (elsewhere / "pyproject.toml").write_text("[project]\nname = 'x'\ndependencies = ['fiberexec']\n")
    (elsewhere.parent / "pyproject.toml").write_text("this mentions fiberexec and is not TOML")
    assert load().max_workers == 1


@pytest.mark.parametrize("text", ["tool = 3 # fiberexec", "[tool]\nother = 'fiberexec'", "[[tool]]\nfiberexec = 3"])
def test_a_pyproject_whose_tools_are_something_else_is_passed_over(elsewhere: Path, text: str) -> None:
    (elsewhere / "pyproject.toml").write_text(text)
    assert values(load()) == DEFAULTS


def test_tables_come_from_a_file_whole(elsewhere: Path) -> None:
    (elsewhere / "fiberexec.toml").write_text('ship = ["data"]\n[env]\nA = "1"\n[backend_options]\nnested = {b = 2}\n')
    settings = load()
    assert (settings.ship, settings.env, settings.backend_options) == (
        ("data",),
        {"A": "1"},
        {"nested": {"b": 2}},
    )


def test_a_working_directory_that_is_gone_has_no_file(elsewhere: Path) -> None:
    elsewhere.rmdir()
    assert values(load()) == DEFAULTS


@pytest.mark.parametrize("text", ["max_workers = ", "\xff", "max_workers = 1\nmax_workers = 2"])
def test_a_file_of_ours_that_cannot_be_read_is_named(text: str, elsewhere: Path) -> None:
    path = elsewhere / "fiberexec.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"fiberexec\.toml"):
        load()


def test_a_table_of_ours_that_is_none_is_refused(elsewhere: Path) -> None:
    (elsewhere / "pyproject.toml").write_text("[tool]\nfiberexec = 3\n")
    with pytest.raises(ConfigError, match="must be a table"):
        load()


BAD = [
    ("backend", 3, "must be a str"),
    ("backend", "", "must not be empty"),
    ("image", b"x", "must be a str"),
    ("max_workers", 0, "must be greater than 0"),
    ("max_workers", -1, "must be greater than 0"),
    ("max_workers", 2.0, "must be an int"),
    ("max_workers", True, "must be an int"),
    ("max_workers", "2", "must be an int"),
    ("min_workers", -1, "must be 0 or more"),
    ("gpu", -1, "must be 0 or more"),
    ("cpu", -0.5, "must be a number of cores"),
    ("cpu", math.inf, "must be a number of cores"),
    ("cpu", math.nan, "must be a number of cores"),
    ("cpu", "two", "must be a number of cores"),
    ("cpu", 0, "must be greater than 0"),
    ("memory", 0, "must be greater than 0"),
    ("memory", "4 Gi", "must be an int"),
    ("memory", "-4Gi", "must be an int"),
    ("memory", "infGi", "must be an int"),
    ("memory", "1_0Gi", "must be an int"),
    ("memory", 1.5, "must be an int"),
    ("memory", -1, "must be an int"),
    ("memory", 1 << 60, "must be an int"),
    ("memory", "512m", "at least 1Mi"),
    ("memory", "9999E", "must be an int"),
    ("timeout", 0, "must be greater than 0"),
    ("timeout", -1, "must be greater than 0"),
    ("timeout", math.nan, "must be greater than 0"),
    ("timeout", math.inf, "at most 1e"),
    ("timeout", 10**400, "too large"),
    ("timeout", "5", "must be a number"),
    ("idle_timeout", -1, "or None for never"),
    ("idle_timeout", "soon", "or None for never"),
    ("max_worker_losses", 0, "must be greater than 0"),
    ("prefix_output", 1, "must be True or False"),
    ("env", {"A": 1}, "must map"),
    ("env", {"A=": "1"}, "must not have"),
    ("env", {"A": "\0"}, "must not have"),
    ("ship", "data", "must be a list of paths"),
    ("ship", [3], "expected str"),
    ("backend_options", [1], "must map"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_a_bad_argument_is_refused_with_its_name_and_what_it_must_be(name: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(**{name: value})
    assert name in str(caught.value)
    assert "argument" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FiberError)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MAX_WORKERS", "many"),
        ("MAX_WORKERS", "1.5"),
        ("TIMEOUT", "soon"),
        ("TIMEOUT", "0"),
        ("MEMORY", "4X"),
        ("PREFIX_OUTPUT", "perhaps"),
        ("ENV", "A=1"),
        ("ENV", "[1]"),
        ("BACKEND_OPTIONS", "3"),
    ],
)
def test_a_bad_variable_is_refused_with_its_name(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FIBEREXEC_{name}", text)
    with pytest.raises(ConfigError, match=f"FIBEREXEC_{name}"):
        load()


def test_a_bad_value_in_a_file_is_refused_with_its_path(elsewhere: Path) -> None:
    (elsewhere / "fiberexec.toml").write_text("timeout = -1\n")
    with pytest.raises(ConfigError, match=r"timeout must be greater than 0.*fiberexec\.toml"):
        load()


def test_a_bad_variable_that_an_argument_beats_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FIBEREXEC_TIMEOUT", "-1")
    assert load(timeout=2).timeout == 2


def test_an_unknown_name_suggests_the_nearest(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'max_worker' \(an argument\): did you mean 'max_workers'"):
        load(max_worker=1)
    with pytest.raises(ConfigError, match="the settings are backend, image"):
        load(zzz=1)
    with monkeypatch.context() as patch:
        patch.setenv("FIBEREXEC_TIME_OUT", "1")
        with pytest.raises(ConfigError, match="did you mean FIBEREXEC_TIMEOUT"):
            load()
    (elsewhere / "fiberexec.toml").write_text("memroy = 1\n")
    with pytest.raises(ConfigError, match=r"'memroy' \(from .*fiberexec\.toml\): did you mean 'memory'"):
        load()


def test_a_variable_that_is_like_no_setting_is_not_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_SOMETHING_ELSE", "1")
    assert values(load()) == DEFAULTS


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (1, MIB),
        (4096, 4096 * MIB),
        ("4Gi", 4 << 30),
        ("1.5Gi", 3 << 29),
        ("512M", 512 * 10**6),
        ("512Mi", 512 * MIB),
        ("2000k", 2_000_000),
        ("1Ti", 1 << 40),
        ("1048576", MIB),
        ("0", 0),
    ],
)
def test_memory_is_mebibytes_or_the_notation_of_kubernetes(value: object, size: int) -> None:
    assert check("memory", value) == size


@pytest.mark.parametrize(("value", "cores"), [(2, 2.0), (0.5, 0.5), ("500m", 0.5), ("1.5", 1.5), (0, 0.0)])
def test_cpu_is_cores_or_the_notation_of_kubernetes(value: object, cores: float) -> None:
    assert check("cpu", value) == cores


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    settings = load(max_workers=numpy.int64(3), timeout=numpy.float32(1.5))
    assert (settings.max_workers, settings.timeout) == (3, 1.5)
    assert type(settings.max_workers) is int
    assert type(settings.timeout) is float


def test_check_names_the_source_that_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"timeout must be .* got 0 \(from options\)"):
        check("timeout", 0, "options")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load().cpu = 3  # type: ignore[misc]


def test_without_a_file_loading_takes_less_than_a_millisecond() -> None:
    load()
    costs = []
    for _ in range(50):
        start = time.perf_counter()
        load(max_workers=2)
        costs.append(time.perf_counter() - start)
    assert sorted(costs)[10] < 0.001


def test_that_nothing_says_otherwise_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("fiberexec._config._said", False)
    with caplog.at_level("INFO", "fiberexec"):
        assert load().backend == load().backend == "local"
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("backend 'local' is used: this process is in no pod and no allocation")


@pytest.mark.parametrize(("variable", "backend"), [("KUBERNETES_SERVICE_HOST", "kubernetes"), ("SLURM_JOB_ID", "slurm")])
def test_the_backend_that_fits_is_chosen_and_said_once(
    variable: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fiberexec._config._said", False)
    monkeypatch.setenv(variable, "7")
    with caplog.at_level("INFO", "fiberexec"):
        assert load().backend == load().backend == backend
    assert [record.getMessage() for record in caplog.records] == [
        f"backend {backend!r} is used: {load().sources['backend']}; backend= chooses another"
    ]
    assert variable in load().sources["backend"]
    assert load(backend="local").backend == "local"


def test_an_allocation_of_slurm_is_never_silently_local(monkeypatch: pytest.MonkeyPatch) -> None:
    from fiberexec import FiberExecutor

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match=r"slurm.*backend='local'"):
        FiberExecutor()


def test_options_are_those_of_the_backend_that_they_were_set_for(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "fiberexec.toml").write_text('backend = "docker"\n[backend_options]\npull = "never"\n')
    assert load().backend_options == load(backend="docker").backend_options == {"pull": "never"}
    assert load(backend="kubernetes").backend_options == {}
    assert load(backend="kubernetes", backend_options={"namespace": "n"}).backend_options == {"namespace": "n"}
    monkeypatch.setenv("FIBEREXEC_BACKEND", "kubernetes")
    monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", '{"namespace": "n"}')
    assert load().backend_options == {"namespace": "n"}
    monkeypatch.delenv("FIBEREXEC_BACKEND_OPTIONS")
    assert load().backend_options == {}
    monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", '{"namespace": "n"}')
    monkeypatch.setenv("FIBEREXEC_BACKEND", "")
    (elsewhere / "fiberexec.toml").unlink()
    assert load().backend_options == load(backend="docker").backend_options == {"namespace": "n"}  # nobody says whose they are
    assert load(backend="local").backend_options == {}
