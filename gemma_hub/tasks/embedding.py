"""BaseModel: a checkpoint without a head, to turn texts into vectors."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from gemma_hub.errors import InputError
from gemma_hub.tasks.loaded_model import BATCH_SIZE, LoadedModel

Pooling = Literal["mean", "last"]


class BaseModel(LoadedModel):
    """A Gemma that gives features. `forward` returns `last_hidden_state` and no logits."""

    task = "base"

    def embed(
        self,
        texts: Sequence[str],
        pooling: Pooling = "mean",
        normalize: bool = True,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> np.ndarray:
        """One vector for each text.

        Args:
            texts: several texts; <bos> is put before each, and counts as a token.
            pooling: "mean" of the features of a text's tokens, or those of its "last" token.
            normalize: scale each vector to length 1.
            batch_size: texts that run at once.

        Returns:
            (len(texts), D) float32.

        Raises:
            InputError: an argument is wrong.
            CapacityError: a text is longer than the model's positions.
            TokenizerError: the checkpoint has no tokenizer.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling is {pooling!r}; expected 'mean' or 'last'.")
        rows = self._encoded(texts)
        vectors = np.zeros((len(rows), self.config.hidden_size), np.float64)
        for places, mask, outputs in self._batches(rows, batch_size):
            features = np.asarray(outputs.last_hidden_state, np.float64)
            lengths = mask.sum(axis=1)
            if pooling == "last":
                vectors[places] = features[np.arange(len(places)), lengths - 1]
            else:
                total = np.where(mask[..., None], features, 0.0).sum(axis=1)
                vectors[places] = total / lengths[:, None]
        if normalize:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.where(norms > 0, norms, 1.0)
        return vectors.astype(np.float32)
