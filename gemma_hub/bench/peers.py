"""Other programs to measure in the same run, each with the environment that it needs.

A folder of peers has a table, peers.toml, and the scripts that it names, in the form that
`gemma_hub.bench.measuring` describes. Of each peer the table says:

    script         file in the folder
    requirements   what to install into an environment of its own; absent: the current one is used
    without_dependencies   what to install there after that, without what it depends on
    format         the checkpoint format that it reads; absent: huggingface
    options        a table that is added to each request
    limits         true where the script measures what the machine can do, not a model
"""

import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_hub.errors import InputError, nearest

TABLE = "peers.toml"
INSTALL_TIMEOUT_S = 1200
_STAMP = "requirements.installed"


@dataclass(frozen=True, slots=True)
class Peer:
    """One row of the table."""

    name: str
    script: Path
    requirements: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    format: str = "huggingface"
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: bool = False


class EnvironmentProblem(Exception):
    """A peer's environment cannot be made; the message says why."""


def read_peers(folder: Path) -> dict[str, Peer]:
    """The peers of a folder by name.

    Raises:
        InputError: there is no table, or it is wrong.
    """
    path = folder / TABLE
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        peers = {name: _peer(name, row, folder) for name, row in table.items()}
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. --peers-dir names the folder with the "
            "scripts of peers; the repository of gemma_hub has one, bench/peers."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no table of peers: {error}.") from error
    for peer in peers.values():
        if not peer.script.is_file():
            raise InputError(f"{path} names {peer.script} for {peer.name}, which is not there.")
    return peers


def _peer(name: str, row: dict[str, Any], folder: Path) -> Peer:
    lists = ("requirements", "without_dependencies")
    found = {key: tuple(value) if key in lists else value for key, value in row.items()}
    return Peer(name=name, **{**found, "script": folder / row["script"]})


def chosen(peers: Mapping[str, Peer], names: Sequence[str]) -> list[Peer]:
    """Those of these names, and all that measure limits.

    Raises:
        InputError: there is no peer of a name.
    """
    known = [name for name, peer in peers.items() if not peer.limits]
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise InputError(
                f"There is no peer {name!r}. {hint}{' ' if hint else ''}Known: {', '.join(known)}."
            )
    return [peers[name] for name in names] + [peer for peer in peers.values() if peer.limits]


def python_of(peer: Peer, folder: Path) -> Path:
    """The interpreter of a peer; its environment is made in `folder` unless it is there.

    Raises:
        EnvironmentProblem: something cannot be installed.
    """
    if not peer.requirements:
        return Path(sys.executable)
    home = folder / peer.name
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    stamp, wanted = home / _STAMP, "\n".join(peer.requirements + peer.without_dependencies)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    if home.exists() and not (home / "pyvenv.cfg").is_file():
        raise EnvironmentProblem(f"{home} is there and is no virtual environment")
    try:
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        _install(python, *peer.requirements)
        if peer.without_dependencies:
            _install(python, "--no-deps", *peer.without_dependencies)
        stamp.write_text(wanted, "utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"its environment cannot be made: {error}") from error
    return python


def _install(python: Path, *requirements: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(
            f"pip was stopped after {INSTALL_TIMEOUT_S} s; it had to install "
            + ", ".join(requirements)
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
        raise EnvironmentProblem(f"pip failed: {said[-1].strip()[-300:]}")
