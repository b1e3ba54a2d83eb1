"""A library is compiled once, kept where nobody else can write, and refused with a reason."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_hub.errors import InputError
from gemma_hub.native import library
from gemma_hub.native.library import check_is_for_native, has_compiler, load_library

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

TWICE = 'extern "C" int twice(int x) { return FACTOR * x; }\n'
COMPILES = """
import sys
from pathlib import Path
from gemma_hub.native.library import load_library
assert load_library(Path(sys.argv[1]), ("-DFACTOR=2",)).twice(2) == 4
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "twice.cpp"
    path.write_text(TWICE, "utf-8")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield tmp_path / "cache" / "native"
    load_library.cache_clear()


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    built = library._built

    def counted(source: Path, *others: object) -> Path:
        calls.append(source)
        return built(source, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "_built", counted)
    return calls


def test_a_library_is_compiled_once_for_all_processes(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_compilations(monkeypatch)
    for _ in range(2):
        assert load_library(source, ("-DFACTOR=2",)).twice(21) == 42
        load_library.cache_clear()  # as in another process
    assert len(calls) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_other_flags_and_another_source_are_another_library(source: Path, cache: Path) -> None:
    assert load_library(source, ("-DFACTOR=2",)).twice(3) == 6
    assert load_library(source, ("-DFACTOR=3",)).twice(3) == 9
    other = source.with_name("other.cpp")
    other.write_text(TWICE.replace("FACTOR", "5 * FACTOR"), "utf-8")
    assert load_library(other, ("-DFACTOR=2",)).twice(3) == 30
    assert len(list(cache.iterdir())) == 3


def test_a_changed_header_is_compiled_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(library, "HEADERS", headers)
    source.write_text('#include "factor.h"\n' + TWICE, "utf-8")
    for factor in (2, 7):
        (headers / "factor.h").write_text(f"#define FACTOR {factor}\n", "utf-8")
        assert load_library(source).twice(3) == 3 * factor
        load_library.cache_clear()
    assert len(list(cache.iterdir())) == 2


def test_a_folder_that_others_can_write_into_is_not_used(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    calls = count_compilations(monkeypatch)
    for _ in range(2):
        assert load_library(source, ("-DFACTOR=2",)).twice(2) == 4
        load_library.cache_clear()
    assert len(calls) == 2
    assert not list(cache.iterdir())


def test_a_library_that_cannot_be_kept_is_loaded_all_the_same(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "write_whole", full)
    assert load_library(source, ("-DFACTOR=2",)).twice(2) == 4
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("compiler", "is_there"), [("no-such-compiler", False), ("c++ -O1", True), ("", True)]
)
def test_whether_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch, compiler: str, is_there: bool
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert has_compiler() == is_there


def test_what_was_planted_there_before_is_not_loaded(source: Path, cache: Path) -> None:
    load_library(source, ("-DFACTOR=2",))
    load_library.cache_clear()
    (planted,) = cache.iterdir()
    planted.unlink()  # not written over: this process has it mapped
    planted.write_bytes(b"not a library")
    cache.chmod(0o777)
    assert load_library(source, ("-DFACTOR=2",)).twice(2) == 4
    assert planted.read_bytes() == b"not a library"


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_damaged_library_is_compiled_again(source: Path, cache: Path, size: int) -> None:
    subprocess.run([sys.executable, "-c", COMPILES, source], check=True, timeout=60)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    subprocess.run([sys.executable, "-c", COMPILES, source], check=True, timeout=60)
    assert [each.read_bytes() for each in cache.iterdir()] == [whole]


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "no-such-compiler does not run"),
        ("false", "false fails"),
        ("c++ --no-such-flag", r"fails: .*no-such-flag"),
    ],
)
def test_a_compiler_that_fails_is_an_error_with_its_reason(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, words: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(InputError, match=f"option native .*{words}.*Install a compiler"):
        load_library(source, ("-DFACTOR=2",))
    assert not cache.exists() or not list(cache.iterdir())


def test_a_source_that_is_wrong_is_an_error_with_the_compiler_s_words(
    source: Path, cache: Path
) -> None:
    source.write_text('extern "C" int twice(', "utf-8")
    with pytest.raises(InputError, match=r"fails: .*error.*expected"):
        load_library(source)
    assert not list(cache.iterdir())


def test_no_compiler_at_all_is_an_error(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"there is no C\+\+ compiler here"):
        load_library(source)


@pytest.mark.parametrize(("device", "dtype"), [("cuda:0", "float32"), ("cpu", "float16")])
def test_a_model_that_it_is_not_for_is_refused(device: str, dtype: str) -> None:
    with pytest.raises(InputError, match=f"the model is {dtype} on {device}"):
        check_is_for_native(device, dtype)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_it_is_for_is_not(device: str, dtype: str) -> None:
    check_is_for_native(device, dtype)
