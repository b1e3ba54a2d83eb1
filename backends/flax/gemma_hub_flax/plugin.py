"""The entry point: says what the flax backend is, without importing jax."""

from gemma_hub.options import told_switches
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub_flax.fast_options import FlaxOptions


@hookimpl
def gemma_hub_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="flax",
            api_version="1.0",
            factory="gemma_hub_flax.backend:FlaxBackend",
            features=frozenset(
                {
                    "attentions",
                    "cache",
                    "cache_rows",
                    "export",
                    "gradients",
                    "greedy_steps",
                    "inputs_embeds",
                }
            ),
            tasks=("base", "causal_lm", "sequence_classification", "token_classification"),
            dtypes=("float32", "bfloat16", "float16"),
            requires=("flax>=0.12,<0.13", "jax>=0.10"),
            summary="JAX: flax.nnx.Module, CPU, GPU and TPU",
            options=told_switches(FlaxOptions),
        )
    ]
