"""The mutants: known bugs of Gemma ports, each as one override of the reference."""

from gemma_hub_conformance.mutants import (
    attention,
    cache,
    embedding,
    feed_forward,
    gradients,
    heads,
    losses,
    norms,
    rope,
)
from gemma_hub_conformance.mutants.bank import Mutant


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by its name."""
    modules = (embedding, norms, rope, attention, feed_forward, cache, heads, losses, gradients)
    found = [mutant for module in modules for mutant in module.bank.mutants]
    by_name = {mutant.name: mutant for mutant in found}
    if len(by_name) != len(found):
        raise RuntimeError("Two mutants have one name.")
    return by_name
