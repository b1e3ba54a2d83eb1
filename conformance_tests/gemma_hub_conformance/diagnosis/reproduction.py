"""A failure as a folder that anyone can run: a checkpoint, the input, what is right, a script."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.checkpoints.output import whole_folder
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.parameters import Weights
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.oracle import Truth

if TYPE_CHECKING:
    from gemma_hub_conformance.diagnosis.finding import Diagnosis

SCRIPT, CHECKPOINT, NUMBERS = "reproduce.py", "checkpoint", "numbers.npz"

_TEMPLATE = '''"""Exit code 0 if the backend ({backend!r}, or the one named) is right, 1 if not."""

import sys
from pathlib import Path

import numpy as np

from gemma_hub import Gemma
from gemma_hub.error_model import judge, noise_band
{imports}
folder = Path(__file__).parent
numbers = np.load(folder / "{numbers}")
ids, mask, positions = (numbers[name] for name in ("input_ids", "mask", "position_ids"))
backend = sys.argv[1] if len(sys.argv) > 1 else {backend!r}
{load}
{run}
verdict = judge(found, numbers["expected"], noise_band(numbers["expected"], numbers["witnesses"]))
print(f"ratio {{verdict.ratio:.3g}}: {{verdict.reason}}")
sys.exit(0 if verdict.passed else 1)
'''

_LOAD = 'lm = Gemma.load(folder / "{checkpoint}", backend, {task!r}, {dtype!r})'

_LOAD_WITH_OPTIONS = """\
options = {options!r} if backend == {backend!r} else {{}}
lm = Gemma.load(
    folder / "{checkpoint}", backend, {task!r}, {dtype!r}, backend_options=options
)"""

_WHOLE = {
    "causal_lm": "found = lm.forward(ids, mask, positions).to_numpy().logits[mask]",
    "token_classification": "found = lm.forward(ids, mask, positions).to_numpy().logits[mask]",
    "base": "found = lm.forward(ids, mask, positions).to_numpy().last_hidden_state[mask]",
    "sequence_classification": (
        "found = lm.forward(ids, mask, positions).to_numpy().logits[mask.any(1)]"
    ),
}

_CACHED = """\
cache, parts, start = lm.contract.init_cache(*ids.shape), [], 0
for size in {chunks}:
    now = (slice(None), slice(start, start + size))
    inputs = ModelInputs.prepare(lm.config, ids[now], mask[now], positions[now])
    outputs, cache = lm.contract.extend(inputs, cache)
    parts.append(outputs.to_numpy().logits)
    start += size
found = np.concatenate(parts, axis=1)[mask]"""


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that fails, with everything that it takes to repeat it.

    Attributes:
        backend: its name.
        dtype: compute type.
        seen: model and input.
        weights: of the model, in the seed of the run that failed.
        truth: what is right there.
        options: `BuildOptions.extra` of the run.
    """

    backend: str
    dtype: str
    seen: Seen
    weights: Weights
    truth: Truth
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> GemmaConfig:
        """The model's."""
        return self.seen.checkpoint.config


def write_reproduction(diagnosis: "Diagnosis", folder: str | Path) -> Path:
    """Write what repeats the failure of `diagnosis` with nothing but gemma_hub.

    The folder gets `reproduce.py`, the checkpoint, and `numbers.npz` with the input, the float64
    result and the witnesses'. It is written whole or not at all.

    Args:
        diagnosis: from `diagnose`.
        folder: to make; it must be new or empty.

    Returns:
        The script. `python reproduce.py` exits with 1 while the backend is wrong.

    Raises:
        InputError: the diagnosis has no input to repeat, or the folder holds something.
        CheckpointError: the weights cannot be written.
    """
    failure = diagnosis.failure
    if failure is None:
        raise InputError(
            f"{diagnosis.case} does not fail on the logits of an input, so there is nothing to "
            f"write. Repeat it with `gemma-hub conformance NAME --case {diagnosis.case}` and "
            "the other options of the run."
        )
    target = Path(folder).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already. Choose a new folder for the reproduction.")
    try:
        with whole_folder(target) as hidden:
            hidden.mkdir(parents=True, exist_ok=True)
            task = failure.seen.checkpoint.task
            save_checkpoint(hidden / CHECKPOINT, failure.config, failure.weights, task=task)
            np.savez(hidden / NUMBERS, **_numbers(failure))  # type: ignore[arg-type]
            (hidden / SCRIPT).write_text(script(failure), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error
    return target / SCRIPT


def script(failure: Failure) -> str:
    """The text of `reproduce.py`."""
    seen, imports = failure.seen, ""
    run = _WHOLE[seen.checkpoint.task]
    if seen.chunks is not None:
        run = _CACHED.format(chunks=repr(seen.chunks))
        imports = "from gemma_hub.inputs import ModelInputs\n"
    load = (_LOAD_WITH_OPTIONS if failure.options else _LOAD).format(
        backend=failure.backend,
        checkpoint=CHECKPOINT,
        task=seen.checkpoint.task,
        dtype=failure.dtype,
        options=dict(failure.options),
    )
    return _TEMPLATE.format(
        backend=failure.backend, imports=imports, numbers=NUMBERS, load=load, run=run
    )


def _numbers(failure: Failure) -> dict[str, np.ndarray]:
    batch = failure.seen.batch
    positions = batch.position_ids
    if positions is None:  # as ModelInputs.prepare counts them
        positions = np.maximum(np.cumsum(batch.mask, axis=1) - 1, 0)
    return {
        "input_ids": batch.input_ids,
        "mask": batch.mask,
        "position_ids": positions,
        "expected": failure.truth.logits,
        "witnesses": np.stack(failure.truth.witness_logits),
    }
