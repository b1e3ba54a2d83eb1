"""The matched filter for a bug in one layer: every known bug is put into that layer alone.

In the model that ends with the first wrong layer all other layers are right, so its errors are this
layer's only, whatever the layers after it do.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from gemma_hub_conformance.diagnosis.matching import MAX_SECONDS, Match
from gemma_hub_conformance.diagnosis.misfits import alignment, compared, misfit, misfit_limit
from gemma_hub_conformance.diagnosis.probes import Prober, prefix
from gemma_hub_conformance.diagnosis.recording import Observation
from gemma_hub_conformance.diagnosis.subjects import planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.mutants.bank import Mutant
from gemma_hub_numpy.model import Reference


@dataclass(frozen=True, slots=True)
class Ranking:
    """Every known bug that shows in one layer, against the subject's errors there.

    Attributes:
        subject: the errors of the subject.
        bugs: by name, those of the known bugs.
        misfits: by name, how ill each explains the subject's.
    """

    subject: Observation
    bugs: dict[str, Observation]
    misfits: dict[str, float]

    @property
    def best(self) -> str | None:
        """The bug that explains most; None if none shows."""
        return min(self.misfits, key=lambda name: self.misfits[name], default=None)

    def like(self, name: str) -> tuple[str, ...]:
        """`name`, and the bugs that differ from it by rounding only."""
        if name not in self.bugs:
            return (name,)
        others = [each for each in self.bugs if each != name]
        return (name, *(o for o in others if not misfit(self.bugs[name], self.bugs[o])))


def match_in_layer(
    prober: Prober, seen: Seen, layer: int, mutants: Mapping[str, Mutant]
) -> Match | None:
    """The known bug whose errors in `layer` are the likest, or None if none shows there."""
    found = ranked_in_layer(prober, seen, layer, mutants, MAX_SECONDS)
    best = found.best
    if best is None:
        return None
    names, worst = found.like(best), found.misfits[best]
    cosine, size = alignment(found.subject, found.bugs[best])
    hints = tuple(mutants[name].hint for name in names)
    return Match(names, hints, cosine, size, worst, worst <= misfit_limit())


def ranked_in_layer(
    prober: Prober,
    seen: Seen,
    layer: int,
    mutants: Mapping[str, Mutant],
    seconds: float = float("inf"),
) -> Ranking:
    """Each of `mutants` in `layer` alone, compared with the subject there.

    Args:
        prober: of the subject.
        seen: an input on which it is wrong.
        layer: the first that is wrong.
        mutants: the known bugs, by name.
        seconds: after so many no further bug is looked at.
    """
    model = replace(seen, checkpoint=prefix(seen.checkpoint, layer + 1))
    residual = prober.residual(model)
    subject = Observation("", {}, (), "") if residual is None else compared(residual)
    if not subject.failed:
        return Ranking(subject, {}, {})
    bugs = {}
    late = time.monotonic() + seconds
    for name, mutant in mutants.items():
        if time.monotonic() > late:
            break
        if not shows_in_a_layer(mutant):
            continue
        kind = cast(type[Reference], mutant.kind)
        bug = Prober(planted(kind, layer, exact=True), prober.dtype, prober.oracle)
        errors = bug.residual(model)
        if errors is not None and (of_bug := compared(errors)).failed:
            bugs[name] = of_bug
    return Ranking(subject, bugs, {name: misfit(subject, bug) for name, bug in bugs.items()})


def shows_in_a_layer(mutant: Mutant) -> bool:
    """Whether the bug can be in what a layer makes of its input.

    Not one around the model, and none that a head, a loss or a gradient is there to show.
    """
    return issubclass(mutant.kind, Reference) and mutant.case[:2] in ("L1", "L2", "L3", "L4")
