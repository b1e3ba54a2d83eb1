"""Parity: backends compared with the float64 reference, in units of rounding noise.

`gemma_hub.parity(...)` runs the comparison. The package has the function's name, so it is made
callable: importing anything from it would otherwise replace the function by the package.
"""

import os
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_hub.parity.compare import Progress
    from gemma_hub.parity.report import ParityReport

__all__ = ["ParityReport", "parity"]


def parity(
    source: str | os.PathLike[str],
    backends: Sequence[str] = ("torch", "flax"),
    texts: Sequence[str | Sequence[int]] | None = None,
    dtype: str = "float32",
    max_new_tokens: int = 32,
    witnesses: int = 8,
    progress: "Progress | None" = None,
    *,
    device: str = "auto",
    seed: int = 7,
) -> "ParityReport":
    """Compare backends with the float64 reference on one checkpoint.

    The reference continues every text, greedily and by seeded sampling. Text and continuation go
    through each backend as one left-padded batch, and every layer's output is judged by the error
    model; the backend also generates by itself, and its tokens are held against the reference's.

    Args:
        source: a checkpoint folder, or the name of an installed checkpoint ("tiny").
        backends: names, as in `Gemma.load`.
        texts: prompts, as strings or as sequences of ids; None for a few that fit the checkpoint.
        dtype: compute type of the backends: "float32", "bfloat16" or "float16". float32 shows
            what the backend computes; a narrower type only that it adds no more than its rounding.
        max_new_tokens: length of each continuation.
        witnesses: runs that measure the rounding noise; at least 2.
        progress: called with what is being done, the steps done and all steps.
        device: of the backends; "auto" for each one's default.
        seed: of the sampled continuations.

    Raises:
        CheckpointNotFoundError, CheckpointError, ConfigError, TokenizerError: as `Gemma.load`.
        BackendNotFoundError: there is no backend of one of the names.
        PluginError: the reference is not installed; one of `backends` that is there and fails is a
            failed column of the report instead.
        InputError: an argument is wrong.
    """
    from gemma_hub.checkpoints import open_checkpoint
    from gemma_hub.parity.compare import compare
    from gemma_hub.parity.texts import prompts
    from gemma_hub.plugins.registry import plugin_registry
    from gemma_hub.source import resolved
    from gemma_hub.tokenizers import open_tokenizer

    checkpoint = open_checkpoint(resolved(source))
    tokenizer = open_tokenizer(checkpoint.path)
    return compare(
        plugin_registry(),
        checkpoint.config,
        checkpoint.weights,
        prompts(texts, checkpoint.config, tokenizer, max_new_tokens),
        source=os.fspath(source),
        backends=backends,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
        witnesses=witnesses,
        seed=seed,
        eos_token_ids=checkpoint.eos_token_ids,
        tokenizer=tokenizer,
        progress=progress,
    )


def __getattr__(name: str) -> Any:
    if name == "ParityReport":
        from gemma_hub.parity.report import ParityReport

        return ParityReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(types.ModuleType):
    __call__ = staticmethod(parity)


sys.modules[__name__].__class__ = _Callable
