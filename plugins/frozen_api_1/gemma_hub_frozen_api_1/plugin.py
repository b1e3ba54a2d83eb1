"""What this distribution tells gemma-hub. Loaded at every start, so it imports no framework."""

from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec


@hookimpl
def gemma_hub_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="frozen_api_1",
            api_version="1.0",
            factory="gemma_hub_frozen_api_1.backend:FrozenApi1Backend",
            features=frozenset({"cache"}),
            tasks=("causal_lm",),
            dtypes=("float32",),
            requires=("numpy>=1.26",),
            summary="NumPy in float32, for version 1.0 of the contract",
        )
    ]
