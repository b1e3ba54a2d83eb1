"""Checkpoints: folders of config.json, *.safetensors and a vocabulary, mapped and checked."""

from gemma_hub.checkpoints.description import (
    Description,
    FileDescription,
    TensorDescription,
    describe_checkpoint,
)
from gemma_hub.checkpoints.reader import Checkpoint, MappedWeights, open_checkpoint
from gemma_hub.checkpoints.writer import MAX_SHARD_BYTES, save_checkpoint

__all__ = [
    "MAX_SHARD_BYTES",
    "Checkpoint",
    "Description",
    "FileDescription",
    "MappedWeights",
    "TensorDescription",
    "describe_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
