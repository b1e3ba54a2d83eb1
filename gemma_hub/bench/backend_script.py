"""What `measuring` runs for a backend of ours: the public interface, ids in and ids out."""

from typing import Any

import numpy as np

from gemma_hub.gemma import Gemma
from gemma_hub.plugins.registry import plugin_registry

DISTRIBUTIONS = ("gemma-hub", "numpy", "torch", "jax", "jaxlib", "flax")


def start(request: dict[str, Any]) -> None:
    plugin_registry().load(request["backend"])


def load(request: dict[str, Any]) -> Any:
    lm = Gemma.load(
        request["checkpoint"],
        backend=request["backend"],
        dtype=request["dtype"],
        device=request["device"],
        backend_options=request["backend_options"],
    )

    def generate(ids: np.ndarray, new: int) -> list[tuple[int, ...]]:
        rows = lm.generate(input_ids=ids.tolist(), max_new_tokens=new, eos_token_id=())
        return [row.token_ids for row in rows]

    return generate
