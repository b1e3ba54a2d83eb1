"""The entry point: says what the backend is, and imports neither torch nor transformers."""

from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec


@hookimpl
def gemma_hub_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="transformers",
            api_version="1.0",
            factory="gemma_hub_transformers.backend:TransformersBackend",
            features=frozenset({"attentions", "cache", "export", "gradients", "inputs_embeds"}),
            tasks=("base", "causal_lm", "sequence_classification", "token_classification"),
            dtypes=("float32", "bfloat16", "float16"),
            requires=("torch>=2.6", "transformers>=5"),
            summary="Hugging Face transformers, to compare with: CPU and CUDA",
        )
    ]
