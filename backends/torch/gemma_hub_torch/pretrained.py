"""What all model classes share: reading and writing. Twin: gemma_hub_flax/pretrained.py."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from gemma_hub.checkpoints import MAX_SHARD_BYTES, open_checkpoint, save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.source import resolved
from gemma_hub_torch.cache import KeyValueCache, empty_cache
from gemma_hub_torch.devices import find_device
from gemma_hub_torch.weights import build_module, check_dtype, export_weights


class Pretrained:
    """A model that is read from a checkpoint folder and written into one.

    Attributes:
        task: what it is for, as in `Gemma.load`.
        config: its hyper-parameters.
    """

    task: ClassVar[str]
    config: GemmaConfig

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        dtype: str = "auto",
        device: str = "auto",
        *,
        num_labels: int | None = None,
        seed: int = 0,
        allow_unknown: Sequence[str] = (),
    ) -> Self:
        """The model of a checkpoint folder or an installed checkpoint ("tiny"), in eval mode.

        Args:
            source: the folder, or the name.
            dtype: "float32", "bfloat16" or "float16"; "auto" for the checkpoint's own.
            device: as in `Gemma.load`.
            num_labels: size of a new head where the checkpoint has none.
            seed: of that head.
            allow_unknown: keys of config.json to ignore although nothing here knows them.

        Raises:
            CheckpointError, ConfigError: the folder is not such a checkpoint.
            InputError: there is no such dtype or device.
        """
        checkpoint = open_checkpoint(
            resolved(source), cls.task, allow_unknown, num_labels=num_labels, seed=seed
        )
        dtype = checkpoint.dtype if dtype == "auto" else dtype
        check_dtype(dtype)
        module: Any = build_module(
            cls, checkpoint.config, checkpoint.weights, dtype, find_device(device)
        )
        return module

    def save_pretrained(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Write config and parameters in the Hugging Face layout, wholly or not at all.

        Raises:
            CheckpointError: there is something at `path`, or it cannot be written.
        """
        save_checkpoint(
            path,
            self.config,
            export_weights(self),
            task=self.task,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )

    def init_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        """An empty cache of `max_length` slots to give as `past_key_values`."""
        decoder: Any = getattr(self, "model", self)
        weight = decoder.embed_tokens.weight
        return empty_cache(self.config, batch_size, max_length, weight.dtype, weight.device)

    def gradient_checkpointing_enable(self) -> None:
        """Compute each layer's activations again in the backward pass: less memory, more time."""
        decoder: Any = getattr(self, "model", self)
        decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations for the backward pass, as in the beginning."""
        decoder: Any = getattr(self, "model", self)
        decoder.gradient_checkpointing = False
