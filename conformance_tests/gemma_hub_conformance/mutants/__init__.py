"""The mutants: known bugs of Gemma ports, each as one override of the reference."""

from gemma_hub_conformance.mutants import (
    attention,
    cache,
    cache_rows,
    catalogued,
    contract,
    embedding,
    feed_forward,
    gradients,
    greedy_steps,
    heads,
    honesty,
    losses,
    norms,
    precision,
    rope,
    sampling,
    sizes,
    storage,
    surviving,
    text,
    unseen_arithmetic,
    unseen_attention,
    unseen_inputs,
    unseen_training,
)
from gemma_hub_conformance.mutants.bank import Mutant


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by its name."""
    causal_lm = (embedding, norms, rope, attention, feed_forward, cache, sizes, precision)
    modules = (contract, *causal_lm, heads, losses, gradients, honesty, sampling, storage, text)
    unseen = (
        unseen_attention,
        unseen_arithmetic,
        unseen_inputs,
        unseen_training,
        surviving,
        cache_rows,
        greedy_steps,
    )
    found = [mutant for module in (*modules, catalogued, *unseen) for mutant in module.bank.mutants]
    by_name = {mutant.name: mutant for mutant in found}
    if len(by_name) != len(found):
        raise RuntimeError("Two mutants have one name.")
    return by_name
