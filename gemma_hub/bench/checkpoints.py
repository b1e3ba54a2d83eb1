"""Random checkpoints of known shapes, for measurements that need no trained weights."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.checkpoints.writer import Progress
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, GemmaHubError
from gemma_hub.parameters import DTYPES, Index, Shape, parameter_shapes

SHAPES = {
    "small": GemmaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
    ),
    "2b": GemmaConfig.preset("gemma-2b"),
    "7b": GemmaConfig.preset("gemma-7b"),
}
"""What `--shape` may be; "small" is small enough for every machine and too large for its caches."""

DTYPE = "bfloat16"  # of the released models
SPARE_BYTES = 100_000_000  # left free beside a checkpoint
_STD = 0.02
_VALUES_AT_ONCE = 1 << 24


class NormalWeights:
    """bfloat16 weights of normal(0, 0.02), made when they are read: the same for the same seed."""

    def __init__(self, config: GemmaConfig, seed: int = 0) -> None:
        self._shapes = parameter_shapes(config)
        self._seed = seed

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return DTYPE

    def read(self, name: str, index: Index = None) -> np.ndarray:
        rng = np.random.default_rng([self._seed, *name.encode()])
        flat = np.empty(math.prod(self._shapes[name]), DTYPES[DTYPE])
        for start in range(0, flat.size, _VALUES_AT_ONCE):
            part = flat[start : start + _VALUES_AT_ONCE]
            part[:] = rng.standard_normal(part.size, np.float32) * _STD
        array = flat.reshape(self._shapes[name])
        return array if index is None else array[index]


def random_checkpoint(folder: Path, config: GemmaConfig, progress: Progress | None = None) -> Path:
    """A folder with a random checkpoint of `config`, made unless it is there already.

    Args:
        folder: written whole or not at all.
        config: the model's.
        progress: told how many bytes of how many are written.

    Raises:
        CheckpointError: the disk has no room for it, or `folder` holds something else.
    """
    config = dataclasses.replace(config, dtype=DTYPE)
    if folder.exists():
        _check_is_same(folder, config)
        return folder
    sizes = map(math.prod, parameter_shapes(config).values())
    check_disk(folder, sum(sizes) * DTYPES[DTYPE].itemsize)
    save_checkpoint(folder, config, NormalWeights(config), progress=progress)
    return folder


def check_disk(target: Path, nbytes: int) -> None:
    """Raise a CheckpointError unless the disk of `target` has room for so many bytes."""
    there = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < nbytes + SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. "
            "Choose a folder on another disk with --cache, or a smaller --shape."
        )


def _check_is_same(folder: Path, config: GemmaConfig) -> None:
    try:
        there = open_checkpoint(folder).config
    except GemmaHubError as error:
        raise CheckpointError(
            f"{folder} should hold a random checkpoint and cannot be read: {error} Delete it."
        ) from error
    if there.to_dict() != config.to_dict():
        raise CheckpointError(
            f"{folder} holds another model than the random one of its name. Delete it."
        )


def matrix_parameters(config: GemmaConfig) -> tuple[int, int]:
    """(all, without the head): parameters of the matrices that a token is multiplied by.

    A decoding step reads all of them; the embedding counts once, as the head.
    """
    sizes = [math.prod(s) for s in parameter_shapes(config).values() if len(s) == 2]
    return sum(sizes), sum(sizes) - config.vocab_size * config.hidden_size
