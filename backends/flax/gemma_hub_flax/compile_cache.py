"""Compiled programs on disk, so that the next process need not compile them again.

JAX has such a cache, but it is switched on for a whole process by `jax.config`, which belongs to
the user. Where a user has done so, this one stays out of the way.

A program is machine code: the folder is made readable and writable for its owner only, and one
that others can write into is not used. Files appear whole, under a name that depends on all that
the program does; several processes may share the folder. Whatever goes wrong with it costs a
compilation and nothing else.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax
from jax.experimental import serialize_executable

from gemma_hub.cache import cache_folder, is_private, processor, write_whole

VARIABLE = "GEMMA_HUB_COMPILE_CACHE"
MAX_BYTES = 1 << 30
MIN_SECONDS = 0.2  # what compiles faster is not worth a file

_DIGEST_BYTES = 32
_SUFFIX = ".program"


def folder() -> Path | None:
    """Where programs are: $GEMMA_HUB_COMPILE_CACHE, or `flax` in gemma_hub's own cache folder.

    None if the variable is "off", or the user has no home.
    """
    given = os.environ.get(VARIABLE)
    if given == "off":
        return None
    if given:
        return Path(given).expanduser()
    with suppress(RuntimeError):
        return cache_folder("flax")
    return None


@dataclass(frozen=True, slots=True)
class CompileCache:
    """The place of one program.

    Attributes:
        path: its file, or None where there is no such cache.
        lowered: the program before it is compiled.
        device: what it runs on.
    """

    path: Path | None
    lowered: Any
    device: jax.Device

    @classmethod
    def of(cls, lowered: Any, device: jax.Device) -> Self:
        """The place of this program for this device."""
        where = folder()
        path = None if where is None else where / f"{_name(lowered, device)}{_SUFFIX}"
        return cls(path, lowered, device)

    def read(self) -> Any | None:
        """The compiled program, ready to be called, or None."""
        if self.path is None or not is_private(self.path.parent):
            return None
        with suppress(Exception):  # of whatever kind: it can be compiled again
            content = self.path.read_bytes()
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            os.utime(self.path)  # it is in use
            return serialize_executable.deserialize_and_load(
                payload,
                self.lowered.in_tree,
                self.lowered.out_tree,
                backend=self.device.client,
                execution_devices=[self.device],
            )
        return None

    def write(self, program: Any, seconds: float) -> None:
        """Keep the program, which took so long to compile."""
        if self.path is None or seconds < MIN_SECONDS:
            return
        with suppress(Exception):  # of whatever kind: the program itself is there
            where = self.path.parent
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(where):
                payload, _, _ = serialize_executable.serialize(program)
                write_whole(self.path, hashlib.sha256(payload).digest() + payload)
                _drop_oldest(where)


def _name(lowered: Any, device: jax.Device) -> str:
    """A name for all that decides what the compiled program is."""
    said = (
        lowered.as_text(),
        jax.__version__,
        version("jaxlib"),
        device.client.platform_version,
        device.device_kind,
        str(device.id),
        os.environ.get("XLA_FLAGS", ""),
        processor(),
    )
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def _drop_oldest(where: Path) -> None:
    """Keep the programs that were used last, MAX_BYTES of them."""
    total = 0
    for _, size, path in sorted(_files(where), reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _files(where: Path) -> Iterator[tuple[float, int, Path]]:
    for path in where.iterdir():
        with suppress(OSError):  # another process has removed it
            status = path.stat()
            yield status.st_mtime, status.st_size, path
