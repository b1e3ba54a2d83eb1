"""write_pack: a folder with models, inputs and everything that is right about them."""

from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.output import whole_folder, write_json
from gemma_hub.checkpoints.writer import write_folder
from gemma_hub.config import read_json_object
from gemma_hub.error_model import RATIO_LIMIT, WORST_RATIO_LIMIT
from gemma_hub.errors import CheckpointError, InputError, nearest
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.packs import format as pack
from gemma_hub_conformance.packs.catalogue import TensorSpec
from gemma_hub_conformance.packs.recording import Arrays, Recording, record
from gemma_hub_conformance.packs.traces import SAMPLINGS, Traces, trace
from gemma_hub_conformance.seeds import checked_seed, seeded

Progress = Callable[[str, int, int], None]
"""Called with (what is made, number of units done, number of all)."""

UNITS = {
    f"{name}-{dtype}": (name, dtype)
    for name in ("gqa", "mqa", "mha", "untied", "bias")
    for dtype in ("float32", "bfloat16")
}
"""{unit: (designed checkpoint, compute type)} of a whole pack."""


def write_pack(
    path: str | Path,
    units: Sequence[str] | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a pack, whole or not at all; the same arguments give the same bytes again.

    Args:
        path: the folder to make.
        units: which of `UNITS`; None for all.
        seed: 0 for the suite's own weights and inputs, any other for fresh ones.
        overwrite: replace a pack that is there.
        progress: told what is made.

    Returns:
        Its size in bytes.

    Raises:
        InputError: there is no such unit or seed, the folder is there already, or it cannot be
            written.
    """
    chosen = checked_units(UNITS if units is None else units, UNITS)
    checked_seed(seed)
    target = Path(path).expanduser().resolve()
    _check_target(target, overwrite)
    try:
        with whole_folder(target) as hidden, seeded(seed):
            manifest = _manifest(seed)
            oracle = Oracle()
            for number, name in enumerate(chosen):
                if progress:
                    progress(name, number, len(chosen))
                (hidden / name).mkdir()
                manifest["units"][name] = _write_unit(hidden / name, name, oracle)
            readme = resources.files("gemma_hub_conformance.packs").joinpath("pack_readme.md")
            pack.write_text(hidden / pack.README, readme.read_text("utf-8"))
            write_json(hidden / pack.MANIFEST, manifest)
            size = pack.folder_size(hidden)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}. A whole pack needs 30 MB of "
            "disk. What was there before is still there."
        ) from error
    return size


def checked_units(wanted: Sequence[str] | dict[str, Any], known: dict[str, Any]) -> list[str]:
    """`wanted` without repetitions.

    Raises:
        InputError: nothing is wanted, or something that is not among `known`.
    """
    for name in wanted:
        if name not in known:
            hint = nearest(str(name), known)
            raise InputError(
                f"There is no unit {name!r}. {hint}{' ' if hint else ''}Known: {', '.join(known)}."
            )
    if not wanted:
        raise InputError(f"No unit was named. Known: {', '.join(known)}.")
    return list(dict.fromkeys(wanted))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file. Choose another path for the pack.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{target} exists already. Choose another path, or overwrite it on purpose."
        )
    if not _is_pack(target):
        raise InputError(f"{target} is not replaced: it is no golden pack. Choose another path.")


def _is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack and nothing beside it."""
    try:
        manifest = read_json_object(folder / pack.MANIFEST, CheckpointError)
    except CheckpointError:
        return False
    units = manifest.get("units")
    if manifest.get("format") != pack.FORMAT or not isinstance(units, dict):
        return False
    return {entry.name for entry in folder.iterdir()} <= {pack.MANIFEST, pack.README, *units}


def _manifest(seed: int) -> dict[str, Any]:
    made_by = {name: metadata.version(name) for name in ("gemma-hub-conformance", "numpy")}
    return {
        "format": pack.FORMAT,
        "version": pack.VERSION,
        "seed": seed,
        "made_by": made_by,
        "limits": {"ratio": RATIO_LIMIT, "worst_ratio": WORST_RATIO_LIMIT},
        "units": {},
    }


def _write_unit(folder: Path, name: str, oracle: Oracle) -> dict[str, Any]:
    """Fill the folder of one unit; its entry in the manifest."""
    checkpoint_name, dtype = UNITS[name]
    checkpoint = CHECKPOINTS[checkpoint_name]
    models = list(oracle.models(checkpoint, dtype))
    recording, traces = record(checkpoint, models, dtype), trace(checkpoint, models)
    write_folder(folder, checkpoint.config, checkpoint.weights(dtype), "causal_lm", {})
    inputs = {key: array for key, (array, _) in _inputs(recording, traces).items()}
    pack.write_arrays(folder / pack.INPUTS, inputs)
    pack.write_arrays(folder / pack.EXPECTED, {**recording.arrays, **traces.tokens})
    pack.write_arrays(folder / pack.NOISE, _noise(recording))
    files = sorted(folder.iterdir())
    return {
        "checkpoint": checkpoint_name,
        "purpose": checkpoint.purpose,
        "dtype": dtype,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": pack.sha256(file)} for file in files
        },
        "samplings": list(SAMPLINGS),
        "inputs": [
            {"name": key, "dtype": _word(array), "shape": list(array.shape), "what": what}
            for key, (array, what) in _inputs(recording, traces).items()
        ],
        "tensors": [spec.to_dict() for spec in _in_order(recording, traces)],
    }


def _in_order(recording: Recording, traces: Traces) -> Iterator[TensorSpec]:
    yield from recording.specs
    yield from traces.specs


def _inputs(recording: Recording, traces: Traces) -> dict[str, tuple[np.ndarray, str]]:
    """{name: (array, what it is)} of inputs.safetensors."""
    batch, prompts = recording.batch, traces.prompts
    positions = batch.position_ids
    assert positions is not None, "every row of a pack's batch states its positions"
    return {
        "input_ids": (_integers(batch.input_ids), "(B, T) token ids, the pad id at padding"),
        "attention_mask": (_integers(batch.mask), "(B, T) 1 at real tokens, 0 at padding"),
        "position_ids": (_integers(positions), "(B, T) position of each token, 0 at padding"),
        "labels": (
            _integers(recording.labels),
            "(8, B, T) labels of the losses, -100 where nothing counts, as in the whole row of far "
            "positions, whose noise would drown the others; labels[0] are those of the "
            "gradients. labels[., b, t] is compared with the logits of slot t - 1",
        ),
        "prompts": (_integers(prompts.input_ids), "(R, P) prompts to continue, padded left"),
        "prompt_mask": (_integers(prompts.mask), "(R, P) 1 at real tokens of the prompts"),
        "uniforms": (
            traces.beside["uniforms"],
            "(S, R, n) random number of each sampled token: of sampling s, prompt r, new token n",
        ),
        "greedy_margins": (
            traces.beside["greedy_margins"],
            "(R, n) by how much the greedy token's logit is ahead of the second best",
        ),
        "greedy_noise": (
            traces.beside["greedy_noise"],
            "(R, n) what rounding does to greedy_margins",
        ),
    }


def _noise(recording: Recording) -> Arrays:
    """Per tensor the noise of each vector, relative, and of each element, absolute."""
    arrays = {}
    for name, band in recording.bands.items():
        arrays[name] = band.element_rms.astype(np.float32)
        arrays[name + pack.PER_VECTOR] = band.token_rms.astype(np.float32)
    return arrays


def _integers(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32)


def _word(array: np.ndarray) -> str:
    return {"float64": "F64", "int32": "I32"}[array.dtype.name]
