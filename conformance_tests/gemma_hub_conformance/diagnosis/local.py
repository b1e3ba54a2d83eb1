"""The matched filter for a bug in one layer: every known bug is put into that layer alone.

In the model that ends with the first wrong layer all other layers are right, so its errors are this
layer's only, whatever the layers after it do.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from gemma_hub_conformance.diagnosis.matching import (
    MAX_SECONDS,
    Match,
    alignment,
    compared,
    misfit,
    misfit_limit,
)
from gemma_hub_conformance.diagnosis.probes import Prober, prefix
from gemma_hub_conformance.diagnosis.recording import Seen
from gemma_hub_conformance.diagnosis.subjects import planted
from gemma_hub_conformance.mutants.bank import Mutant
from gemma_hub_numpy.model import Reference


def match_in_layer(
    prober: Prober, seen: Seen, layer: int, mutants: Mapping[str, Mutant]
) -> Match | None:
    """The known bug whose errors in `layer` are the likest, or None if none shows there."""
    model = replace(seen, checkpoint=prefix(seen.checkpoint, layer + 1))
    residual = prober.residual(model)
    if residual is None:
        return None
    subject = compared(residual)
    bugs, late = {}, time.monotonic() + MAX_SECONDS
    for name, mutant in mutants.items():
        if time.monotonic() > late:
            break
        if not issubclass(mutant.kind, Reference):
            continue  # its bug is around the model, not in a layer
        bug = Prober(planted(mutant.kind, layer, exact=True), prober.dtype, prober.oracle)
        errors = bug.residual(model)
        if errors is not None and (seen_of_bug := compared(errors)).failed:
            bugs[name] = seen_of_bug
    if not bugs:
        return None
    misfits = {name: misfit(subject, bug) for name, bug in bugs.items()}
    best = min(misfits, key=lambda name: misfits[name])
    alike = [name for name, bug in bugs.items() if name != best and not misfit(bugs[best], bug)]
    names = (best, *alike)
    cosine, size = alignment(subject, bugs[best])
    hints = tuple(mutants[name].hint for name in names)
    return Match(names, hints, cosine, size, misfits[best], misfits[best] <= misfit_limit())
