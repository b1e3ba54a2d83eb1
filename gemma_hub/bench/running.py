"""The rounds: every configuration once in each, in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gemma_hub.bench import measuring
from gemma_hub.bench.checkpoints import check_disk, matrix_parameters
from gemma_hub.bench.peers import EnvironmentProblem, Peer, python_of
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert
from gemma_hub.errors import GemmaHubError, InputError
from gemma_hub.parameters import DTYPES

SHORT_PROMPT = 128
TIMEOUT_S = 3600

Progress = Callable[[str, int, int], None]
"""Called with (what is done now, number of it, how many there are)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        dtypes: compute types.
        device: in the framework's words, for the backends.
        batches: numbers of rows to decode.
        prompt: tokens of the prompt of prefill; those of decoding have at most SHORT_PROMPT.
        new: tokens that are decoded after the first.
        rounds: processes for each configuration.
        repeats: timed runs in each process.
        backend_options: of every backend.
    """

    dtypes: tuple[str, ...] = ("bfloat16",)
    device: str = "auto"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 512
    new: int = 64
    rounds: int = 3
    repeats: int = 3
    backend_options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, config: GemmaConfig) -> None:
        """Raise an InputError if a setting is wrong for a model."""
        for name in ("prompt", "new", "rounds", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        for name, values in (("batch", self.batches), ("dtype", self.dtypes)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} is {values}; expected different values, at least one.")
        if min(self.batches) < 1:
            raise InputError(f"--batch is {min(self.batches)}; expected at least 1.")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise InputError(f"There is no dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
        longest = max(self.prompt, self.short_prompt + self.new)
        if longest > config.max_position_embeddings:
            raise InputError(
                f"--prompt {self.prompt} and --new {self.new} need {longest} positions and the "
                f"model has {config.max_position_embeddings}. Ask for fewer tokens."
            )

    @property
    def short_prompt(self) -> int:
        return min(SHORT_PROMPT, self.prompt)


@dataclass(slots=True)
class Subject:
    """One configuration, and what became of it.

    Attributes:
        name: of the backend or the peer.
        kind: "backend", "peer" or "limits".
        dtype: the compute type.
        script: what `measuring` runs.
        request: what is asked of it.
        peer: where it is one.
        samples: what `measuring` answered, one for each round.
        error: why there are fewer than there should be; empty if there are not.
    """

    name: str
    kind: str
    dtype: str
    script: Path
    request: dict[str, Any]
    peer: Peer | None = None
    python: Path = Path(sys.executable)
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def subjects(
    settings: Settings,
    checkpoint: Path,
    config: GemmaConfig,
    backends: Sequence[str],
    peers: Sequence[Peer],
) -> list[Subject]:
    """Every configuration, the backends first."""
    here = Path(measuring.__file__).parent
    found = []
    for dtype in settings.dtypes:
        request = {
            **dataclasses.asdict(settings),
            "dtype": dtype,
            "checkpoint": str(checkpoint),
            "vocab_size": config.vocab_size,
            "short_prompt": settings.short_prompt,
        }
        script = here / "backend_script.py"
        found += [
            Subject(name, "backend", dtype, script, {**request, "backend": name})
            for name in backends
        ]
        found.append(Subject("numpy", "limits", dtype, here / "numpy_limits.py", request))
        for peer in peers:
            kind = "limits" if peer.limits else "peer"
            asked = {**request, **peer.options}
            found.append(Subject(peer.name, kind, dtype, peer.script, asked, peer))
    return found


def prepare(
    found: Sequence[Subject], config: GemmaConfig, cache: Path, progress: Progress | None = None
) -> None:
    """The environments and checkpoints of peers; what goes wrong becomes the subject's error."""
    failed: dict[str, str] = {}
    for number, subject in enumerate(found):
        peer = subject.peer
        if peer is None:
            continue
        if progress is not None:
            progress(f"preparing {peer.name}", number, len(found))
        try:
            if peer.name in failed:
                raise EnvironmentProblem(failed[peer.name])
            subject.python = python_of(peer, cache / "environments")
            if peer.format != "huggingface":
                source = Path(subject.request["checkpoint"])
                target = converted(source, subject.dtype, peer.format, config, cache)
                subject.request["checkpoint"] = str(target)
        except EnvironmentProblem as problem:
            subject.error = failed[peer.name] = str(problem)
        except GemmaHubError as error:
            subject.error = str(error)


def converted(source: Path, dtype: str, to: str, config: GemmaConfig, cache: Path) -> Path:
    """The checkpoint in another format, made in `cache` unless it is there."""
    target = cache / "checkpoints" / f"{source.name}-{dtype}-{to}"
    if to == "gguf":
        target = target.with_name(f"{target.name}.gguf")
    if not target.exists():
        check_disk(target, matrix_parameters(config)[0] * DTYPES[dtype].itemsize)
        convert(source, target, to, dtype=dtype, probe=False)
    return target


def run(found: Sequence[Subject], rounds: int, progress: Progress | None = None) -> None:
    """Measure in turn, `rounds` times; a subject that has failed once is left out after that."""
    total, done = rounds * len(found), 0
    for number in range(rounds):
        for subject in found:
            if progress is not None:
                what = f"round {number + 1} of {rounds}: {subject.name} {subject.dtype}"
                progress(what, done, total)
            if not subject.error:
                _run_once(subject)
            done += 1


def _run_once(subject: Subject) -> None:
    # -P: the folder of a script must not come before the packages that it imports.
    command = [str(subject.python), "-P", str(measuring.__file__), str(subject.script)]
    try:
        # An empty cache each time, so that programs are compiled and not read from a former run.
        with TemporaryDirectory() as cache:
            done = subprocess.run(
                [*command, json.dumps(subject.request)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                env=os.environ | {"GEMMA_HUB_CACHE": cache},
            )
    except subprocess.TimeoutExpired:
        subject.error = f"it was stopped after {TIMEOUT_S} s"
        return
    except OSError as error:
        subject.error = f"{subject.python} cannot be run: {error.strerror}"
        return
    if done.returncode:
        subject.error = _reason(done.returncode, done.stderr)
        return
    subject.samples.append(json.loads(done.stdout))


def _reason(code: int, said: str) -> str:
    """Why a process failed: its last line, or the signal that killed it."""
    if code < 0:
        name = signal.Signals(-code).name
        more = "; the system does so where memory is short" if name == "SIGKILL" else ""
        return f"it was killed by {name}{more}"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip()[-500:] if lines else f"it exited with code {code}"
