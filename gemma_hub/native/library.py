"""Compiles a C++ file into a library for this processor, once, and loads it.

The file may include the headers of this folder. Libraries are kept in gemma_hub's cache folder
under a name that depends on all that goes into them; a folder that others can write into is not
used.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from gemma_hub.cache import cache_folder, is_private, processor, write_whole
from gemma_hub.errors import InputError

HEADERS = Path(__file__).parent

_COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: it would reorder the sums, and they are vectors as they are written.
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-c")
_LINK = ("-shared",)
_TIMEOUT_S = 300


def check_is_for_native(device: str, dtype: str) -> None:
    """Refuse the option for a model that the products are not for.

    Raises:
        InputError: the model is on another device than the CPU, or in another dtype than float32
            and bfloat16.
    """
    if not device.startswith("cpu") or dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"The option native was given and the model is {dtype} on {device}; it is for float32 "
            "and bfloat16 on device='cpu' only. Leave it out."
        )


@lru_cache(maxsize=8)
def load_library(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of `source`, compiled with `flags` unless it is in the cache.

    A symbol that the file does not have is looked for in what the process has loaded, so that
    `-fopenmp` takes the threads that are there.

    Raises:
        InputError: there is no compiler, or it fails.
    """
    command = [*_compiler(), *_COMPILE, f"-I{HEADERS}", *flags]
    folder, name = _private_folder(), _name(source, command)
    if folder is not None and (kept := _kept(folder, name)):
        with suppress(InputError):  # of another kind of machine
            return _loaded(kept)
    with tempfile.TemporaryDirectory() as temporary:
        built = _built(source, command, Path(temporary))
        if folder is not None:
            with suppress(OSError):  # a full disk costs a compilation in the next process
                content = built.read_bytes()
                path = folder / _file_name(name, content)
                write_whole(path, content)
                return _loaded(path)
        return _loaded(built)  # which stays loaded without its file


def _kept(folder: Path, name: str) -> Path | None:
    """The library in `folder`, if it is whole: the process ends where it runs code cut off."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            if path.name == _file_name(name, path.read_bytes()):
                return path
            path.unlink()
    return None


def _file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _built(source: Path, command: Sequence[str], folder: Path) -> Path:
    object_file, library = folder / "library.o", folder / "library.so"
    _run([*command, str(source), "-o", str(object_file)])
    _run([*_compiler(), *_LINK, str(object_file), "-o", str(library)])
    return library


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{_asked()}, and {command[0]} does not run: {error}. {_advice()}"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise InputError(
            f"{_asked()}, and {command[0]} fails: {said[0].strip()[:300]}. {_advice()}"
        )
    return done.stdout


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"{_asked()}, and its library cannot be loaded: {error}. {_advice()}"
        ) from error


def has_compiler() -> bool:
    """Whether there is a command that may compile C++."""
    return any(shutil.which(command[0]) for command in _candidates())


def _candidates() -> list[list[str]]:
    given = shlex.split(os.environ.get("CXX", ""))
    return [given] if given else [[name] for name in _COMPILERS]


def _compiler() -> list[str]:
    """The command that compiles C++: $CXX, or the first of the usual names."""
    if os.environ.get("CXX"):
        return _candidates()[0]  # what is wrong with it shows when it is run
    for command in _candidates():
        if shutil.which(command[0]):
            return command
    raise InputError(f"{_asked()}, and there is no C++ compiler here. {_advice()}")


def _asked() -> str:
    return "The option native was given, which compiles C++ for this processor"


def _advice() -> str:
    return (
        "Install a compiler such as g++, name it in the environment variable CXX, or leave the "
        "option out."
    )


def _name(source: Path, command: Sequence[str]) -> str:
    """A name for all that decides what the library is."""
    version = _run([*_compiler(), "--version"])
    files = [source, *sorted(HEADERS.glob("*.h"))]
    said = [processor(), version, *command, *(file.read_text("utf-8") for file in files)]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:32]


def _private_folder() -> Path | None:
    """Where libraries are kept; None where there is no folder that only this user can write."""
    with suppress(RuntimeError, OSError):
        folder = cache_folder("native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(folder):
            return folder
    return None
