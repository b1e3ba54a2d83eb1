"""Compiled programs on disk: used again by another process, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_hub_flax import compile_cache
from gemma_hub_flax.compile_programs import Programs

VARIABLE = compile_cache.VARIABLE
COMPILED = "/jax/core/compile/backend_compile_duration"
X = np.arange(6.0, dtype=np.float32)

PROCESS = f"""
import jax
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: events.append(event) if event == {COMPILED!r} else None
)
events = []
from gemma_hub import Gemma
settings = dict(jax.config.values)
out = Gemma.load("tiny", backend="flax").generate("Once upon a time", max_new_tokens=4)
assert dict(jax.config.values) == settings
print(len(events), list(out.token_ids), sep=";")
"""


@pytest.fixture(autouse=True)
def quick_programs_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "MIN_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "programs"))
    return tmp_path / "programs"


def scaled(factor: int, x: Any) -> Any:
    return x * factor


def call(factor: int = 3) -> Any:
    """A program that is new to this process."""
    return Programs(scaled)(factor, jnp.asarray(X))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def run_process(folder: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env={**os.environ, VARIABLE: folder},
        capture_output=True,
        text=True,
        check=True,
    )
    count, _, ids = done.stdout.strip().partition(";")
    return int(count), ids


def test_a_second_process_compiles_no_model_again(tmp_path: Path) -> None:
    without, expected = run_process("off")
    first = run_process(str(tmp_path))
    assert first == (without, expected)
    kept = len(files(tmp_path))
    assert kept == 2, "the prompt's and the next tokens' programs"
    second, ids = run_process(str(tmp_path))
    assert ids == expected
    assert second == without - kept


def test_a_program_is_read_back_and_does_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call()
    (path,) = files(folder)
    assert path.stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # it would not be called
    found = call()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, X * 3)
    with pytest.raises(TypeError):
        call(factor=4)  # another program


@pytest.mark.parametrize("damage", [b"", b"not a program", None])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: bytes | None) -> None:
    call()
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    np.testing.assert_array_equal(call(), X * 3)
    assert len(path.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_made_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "programs"))
    np.testing.assert_array_equal(call(), X * 3)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no such permissions here")
def test_a_folder_that_others_write_into_is_not_used(folder: Path) -> None:
    call()
    (path,) = files(folder)
    folder.chmod(0o777)
    read = path.stat().st_atime_ns, path.stat().st_mtime_ns
    np.testing.assert_array_equal(call(), X * 3)
    call(factor=4)
    assert files(folder) == [path]
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == read


def test_it_can_be_switched_off_and_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "off")
    call()
    assert not files(tmp_path)
    monkeypatch.delenv(VARIABLE)
    call()
    assert len(files(tmp_path / "flax")) == 1


def test_the_programs_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for factor in (2, 3, 5):
        call(factor)
        paths += [path for path in files(folder) if path not in paths]
    first, second, third = paths
    total = sum(path.stat().st_size for path in paths)
    third.unlink()
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    call(factor=2)  # now the first is the one that was used last
    monkeypatch.setattr(compile_cache, "MAX_BYTES", total - 1)
    call(factor=5)
    assert set(files(folder)) == {first, third}


def test_the_cache_of_jax_is_left_alone(folder: Path) -> None:
    assert jax.config.jax_compilation_cache_dir is None
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder / "of_jax"))
        np.testing.assert_array_equal(call(), X * 3)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not [path for path in files(folder) if path.suffix == ".program"]


def test_donated_memory_is_used_and_shapes_have_programs_of_their_own(folder: Path) -> None:
    function = Programs(lambda static, x: x + static, donated=(1,))
    for shape in ((3,), (4,), (3,)):
        given = jnp.zeros(shape)
        np.testing.assert_array_equal(function(2, given), np.full(shape, 2.0))
        assert given.is_deleted()
    assert len(files(folder)) == 2
