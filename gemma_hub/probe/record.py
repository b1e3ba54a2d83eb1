"""Probe: the record in gemma_hub_probe.json, checked when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.config import ARCHITECTURES, CLASSIFICATIONS, GemmaConfig, read_json_object
from gemma_hub.error_model import Float64
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES

PROBE_FILE = "gemma_hub_probe.json"
_VERSION = 1
_MOST_BYTES = 4 << 20
_MOST_TOKENS = 256
_MOST_COLUMNS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """What rounding does to a probe's values, measured by witnesses of the reference.

    Attributes:
        dtype: the precision that it was measured in, a key of `gemma_hub.parameters.DTYPES`.
        tokens: (n,) relative error to expect of each row of the values.
        elements: (n, K) absolute error to expect of each value.
    """

    dtype: str
    tokens: Float64
    elements: Float64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A fixed input, and what a model computes from it.

    Attributes:
        task: what the model is for, a key of `gemma_hub.config.ARCHITECTURES`.
        token_ids: (B, T) int64, without padding.
        columns: (K,) int64: which of the last axis's entries are kept. They are ids for a causal
            language model, labels for a classifier, features for the model without a head.
        values: (n, K) float64, a row for each token, or for each text where the task has one result
            for a text. Natural log-probabilities of a causal language model, logits of a
            classifier, the final norm's output of the model without a head.
        dtype: the precision that made them; "float64" for the reference.
        noise: what rounding does to them; None where no witness ran.
        made_by: {"backend": ..., and versions by the name of what has them}.
    """

    task: str
    token_ids: np.ndarray
    columns: np.ndarray
    values: Float64
    dtype: str
    noise: Noise | None
    made_by: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it; noise to four digits."""
        noise = self.noise and {
            "dtype": self.noise.dtype,
            "tokens": _rounded(self.noise.tokens),
            "elements": _rounded(self.noise.elements),
        }
        return {
            "version": _VERSION,
            "task": self.task,
            "token_ids": self.token_ids.tolist(),
            "columns": self.columns.tolist(),
            "values": self.values.tolist(),
            "dtype": self.dtype,
            "noise": noise,
            "made_by": dict(self.made_by),
        }


def rows_of(config: GemmaConfig, task: str, token_ids: np.ndarray) -> tuple[int, int]:
    """(n, width) of a task's result for `token_ids`, before columns are taken."""
    rows = len(token_ids) if task == "sequence_classification" else token_ids.size
    if task in CLASSIFICATIONS:
        return rows, config.num_labels
    return rows, config.vocab_size if task == "causal_lm" else config.hidden_size


def read_probe(folder: Path, config: GemmaConfig) -> Probe | None:
    """The probe of the checkpoint in `folder`; None if it has none.

    Raises:
        CheckpointError: it is damaged, of a later version, or belongs to another config.
    """
    path = folder / PROBE_FILE
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise CheckpointError(
            f"{path} has {size:,} bytes; a probe has at most {_MOST_BYTES:,}. Delete it."
        )
    try:
        return _parsed(read_json_object(path, CheckpointError), config)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError) and str(path) in str(error):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is no probe of this checkpoint: {what} Delete it, or convert or save the "
            "model again to get a new one."
        ) from error


def needed_probe(path: Path, config: GemmaConfig) -> Probe:
    """The probe of the checkpoint at `path`.

    Raises:
        CheckpointError: as `read_probe`, and where there is none.
    """
    probe = read_probe(path, config)
    if probe is None:
        raise CheckpointError(
            f"{path} has no {PROBE_FILE} to verify it by. A model that is saved has one, and so "
            f"has a folder that this makes: gemma-hub convert {path} FOLDER"
        )
    return probe


def _parsed(record: Mapping[str, Any], config: GemmaConfig) -> Probe:
    if record["version"] != _VERSION:
        raise ValueError(f"its version is {record['version']!r}; this program reads {_VERSION}.")
    task, dtype = record["task"], record["dtype"]
    _check_word("task", task, ARCHITECTURES)
    _check_word("dtype", dtype, DTYPES)
    token_ids = _integers("token_ids", record["token_ids"], 2, config.vocab_size)
    if token_ids.size > _MOST_TOKENS or token_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"its token_ids are {token_ids.shape}, more than a probe may have.")
    rows, width = rows_of(config, task, token_ids)
    columns = _integers("columns", record["columns"], 1, width)
    if columns.size > _MOST_COLUMNS:
        raise ValueError(f"it has {columns.size} columns, more than the {_MOST_COLUMNS} allowed.")
    shape = (rows, columns.size)
    made_by = record["made_by"]
    if not isinstance(made_by, dict) or not all(isinstance(v, str) for v in made_by.values()):
        raise ValueError("its made_by is no object of strings.")
    return Probe(
        task=task,
        token_ids=token_ids,
        columns=columns,
        values=_numbers("values", record["values"], shape),
        dtype=dtype,
        noise=_noise(record["noise"], shape),
        made_by=made_by,
    )


def _noise(record: Mapping[str, Any] | None, shape: tuple[int, int]) -> Noise | None:
    if record is None:
        return None
    dtype = record["dtype"]
    _check_word("noise's dtype", dtype, DTYPES)
    tokens = _numbers("noise's tokens", record["tokens"], shape[:1])
    elements = _numbers("noise's elements", record["elements"], shape)
    # Noise without bounds would let anything pass.
    if min(tokens.min(), elements.min()) <= 0 or tokens.max() >= 1:
        raise ValueError("its noise is not between 0 and the values themselves.")
    return Noise(dtype=dtype, tokens=tokens, elements=elements)


def _check_word(what: str, word: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(word, str) or word not in known:
        raise ValueError(f"its {what} is {word!r}; expected one of {', '.join(known)}.")


def _integers(what: str, value: Any, axes: int, below: int) -> np.ndarray:
    array = np.array(value)
    if array.ndim != axes or array.dtype != np.int64 or not array.size:
        raise ValueError(f"its {what} are no integers in {axes} axes.")
    if array.min() < 0 or array.max() >= below:
        raise ValueError(
            f"its {what} go from {array.min()} to {array.max()}; expected 0 to below {below}."
        )
    return array


def _numbers(what: str, value: Any, shape: tuple[int, ...]) -> Float64:
    array = np.array(value)
    if array.shape != shape or array.dtype.kind not in "if":
        raise ValueError(f"its {what} are no numbers of shape {shape}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"its {what} are not all finite.")
    return array


def _rounded(array: Float64) -> Any:
    """Nested lists of `array` to four significant digits."""
    if array.ndim > 1:
        return [_rounded(row) for row in array]
    return [float(f"{value:.3e}") for value in array]
