"""The entry point: says what the torch backend is, without importing torch."""

from gemma_hub.options import told_switches
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub_torch.fast_options import TorchOptions


@hookimpl
def gemma_hub_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="torch",
            api_version="1.0",
            factory="gemma_hub_torch.backend:TorchBackend",
            features=frozenset(
                {"attentions", "cache", "cache_rows", "export", "gradients", "inputs_embeds"}
            ),
            tasks=("base", "causal_lm", "sequence_classification", "token_classification"),
            dtypes=("float32", "bfloat16", "float16"),
            requires=("torch>=2.6",),
            summary="PyTorch: torch.nn.Module, CPU and CUDA",
            options=told_switches(TorchOptions),
        )
    ]
