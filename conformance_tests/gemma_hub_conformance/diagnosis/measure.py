"""How well bugs are found: `python -m gemma_hub_conformance.diagnosis.measure [--sample N]`.

Every mutant, rounding as a legal implementation does, fails its case, and the matched filter is
asked for its name. Then every mutant that shows in the logits is put into one layer alone. Prints
what was missed, the rates, and the limit of the misfit that follows: the geometric mean of the
largest misfit of a bug with itself and the smallest of two bugs that differ.
"""

import argparse
import math
import time

from rich.console import Console

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis.local import match_in_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, match
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import Seen, observe
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_numpy.model import Reference

_CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)

LAYER = 1
"""Where the bugs of one layer are put."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=1, help="only every N-th mutant")
    step = parser.parse_args().sample
    start = time.monotonic()
    for what, (named, seen, own, other) in (
        ("everywhere", everywhere(step)),
        (f"in layer {LAYER} only", in_one_layer(step)),
    ):
        _CONSOLE.print(f"{what}: {named} of {seen} named first ({100 * named / seen:.1f} %)")
        _CONSOLE.print(f"  largest misfit with itself {own:.3g}, smallest with another {other:.3g}")
        if own > 0:
            _CONSOLE.print(f"  geometric mean {math.sqrt(own * other):.2g}")
    _CONSOLE.print(f"{time.monotonic() - start:.0f} s")


def everywhere(step: int = 1) -> tuple[int, int, float, float]:
    """(named first, failed, largest misfit of the right name, smallest of a wrong one)."""
    oracle, cases = Oracle(), all_cases()
    known = KnownBugs(oracle)
    named, failed, own, other = 0, 0, 0.0, 1.0
    bugs = sorted(known.mutants.items(), key=lambda item: item[1].case)[::step]
    for name, mutant in bugs:
        subject = noisy(mutant)
        first = observe(cases[mutant.case], subject, oracle)
        if not first.failed:
            _CONSOLE.print(f"{name} passes {mutant.case} when it rounds")
            continue
        failed += 1
        found = match(subject, first, known, seconds=math.inf)
        first_match = found.matches[0] if found.matches else None
        if first_match is None or name not in first_match.names:
            _CONSOLE.print(f"{name}, {mutant.case}: {[each.names for each in found.matches]}")
            continue
        named += 1
        own = max(own, first_match.misfit)
        other = min([other, *(each.misfit for each in found.matches[1:])])
    return named, failed, own, other


def in_one_layer(step: int = 1) -> tuple[int, int, float, float]:
    """The same for bugs in `LAYER` alone, of those that show there."""
    seen = Seen(GQA, Batch.of([row(tokens(23, 1)), row(tokens(17, 2), left=6)], 23), None)
    mutants, oracle = all_mutants(), Oracle()
    named, failed, own = 0, 0, 0.0
    for name, mutant in list(mutants.items())[::step]:
        if not issubclass(mutant.kind, Reference):
            continue
        prober = Prober(planted(mutant.kind, LAYER), "float32", oracle)
        if not prober.fails(seen):
            continue
        failed += 1
        found = match_in_layer(prober, seen, LAYER, mutants)
        if found is None or name not in found.names:
            _CONSOLE.print(f"{name}: {found and found.names}")
            continue
        named += 1
        own = max(own, found.misfit)
    return named, failed, own, 1.0


if __name__ == "__main__":
    main()
