"""What this distribution tells gemma_hub: one backend. Imports no array framework."""

from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec


@hookimpl
def gemma_hub_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="numpy",
            api_version="1.0",
            factory="gemma_hub_numpy.backend:NumpyBackend",
            features=frozenset(
                {
                    "attentions",
                    "cache",
                    "cache_rows",
                    "export",
                    "gradients",
                    "greedy_steps",
                    "inputs_embeds",
                    "sliding_window",
                    "softcap",
                }
            ),
            tasks=("base", "causal_lm", "sequence_classification", "token_classification"),
            dtypes=("float64", "float32", "bfloat16", "float16"),
            requires=("numpy>=1.26", "ml_dtypes>=0.4"),
            summary="NumPy in float64: the reference, slow and exact",
            options={"witness": "seed of the random rounding that a type below float64 has"},
        )
    ]
