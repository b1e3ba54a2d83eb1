"""The cases, by the behaviour that they check."""

from gemma_hub_conformance.cases import (
    attentions,
    cache,
    contract,
    forward,
    generation,
    gradients,
    head_contract,
    heads,
    liveness,
    losses,
    masks,
    narrow,
    outputs,
    positions,
)
from gemma_hub_conformance.spec import CaseSpec


def all_cases() -> dict[str, CaseSpec]:
    """Every case by its id, in the order in which they run."""
    causal_lm = (contract, forward, positions, masks, outputs, liveness, cache, narrow, generation)
    modules = (*causal_lm, head_contract, heads, losses, attentions, gradients)
    cases = [case for module in modules for case in module.cases()]
    by_id = {case.id: case for case in cases}
    if len(by_id) != len(cases):
        raise RuntimeError("Two cases have one id.")
    return by_id
