"""How well bugs are found: `python -m gemma_hub_conformance.diagnosis.measure [--sample N]`.

Every mutant, rounding as a legal implementation does, fails its case, and the matched filter is
asked for its name. Then every mutant that shows in the logits is put into one layer alone. Prints
what was missed, which bugs look alike, the rates, the times, and the limit of the misfit that
follows: the geometric mean of the largest misfit of a right name and the smallest of a wrong one.
A bug whose errors are so much a matter of rounding that no limit could name it counts as missed,
and is listed. `--write` stores the limit with its evidence in calibration.json.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis.local import ranked_in_layer, shows_in_a_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, match
from gemma_hub_conformance.diagnosis.misfits import PATH, Naming, limit_between, misfit_limit
from gemma_hub_conformance.diagnosis.probes import Prober, prefix
from gemma_hub_conformance.diagnosis.recording import observe
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.rows import Batch, row, tokens

_CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)

LAYER = 1
"""Where the bugs of one layer are put."""


@dataclass
class Tally:
    """What was found of some bugs.

    Attributes:
        failed: number of bugs that failed their case.
        named: number of them that were named first, and well enough to say so.
        nearest: number of the others that were the nearest known bug, and that is all.
        right: the misfit of each bug with the known one of its name.
        wrong: the smallest misfit of each with a known bug that is not like it.
        alike: the groups of more than one that nothing told apart, the right name among them.
        seconds: CPU seconds of the matching of each.
    """

    failed: int = 0
    named: int = 0
    nearest: int = 0
    right: list[Naming] = field(default_factory=list)
    wrong: list[Naming] = field(default_factory=list)
    alike: set[tuple[str, ...]] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    def note(self, bug: str, case: str, misfits: dict[str, float], like: tuple[str, ...]) -> None:
        """One bug: the misfit of each known one, and those that are like it, itself included."""
        if bug in misfits:
            self.right.append(Naming(misfits[bug], bug, bug, case))
        others = {name: value for name, value in misfits.items() if name not in like}
        if others:
            name = min(others, key=lambda each: others[each])
            self.wrong.append(Naming(others[name], bug, name, case))

    def say(self, what: str) -> None:
        """Print it."""
        share = 100 * self.named / max(1, self.failed)
        _CONSOLE.print(f"{what}: {self.named} of {self.failed} named first ({share:.1f} %)")
        _CONSOLE.print(f"  {self.nearest} more are the nearest, and do not fit")
        for group in sorted(self.alike):
            _CONSOLE.print(f"  look alike: {', '.join(group)}")
        if self.right and self.wrong:
            _CONSOLE.print(f"  largest misfits of right names {sorted(self.right)[-5:]}")
            _CONSOLE.print(f"  smallest of wrong names {sorted(self.wrong)[:3]}")
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            _CONSOLE.print(f"  {mean:.2f} s each, {max(self.seconds):.2f} s at most (CPU)")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=1, help="only every N-th mutant")
    parser.add_argument("--first", type=int, default=0, help="the mutant of the sample to start at")
    parser.add_argument("--write", action="store_true", help="write calibration.json")
    parser.add_argument("--keep", action="store_true", help="write its counts only")
    arguments = parser.parse_args()
    start = time.monotonic()
    chosen = slice(arguments.first, None, arguments.sample)
    anywhere, local = everywhere(chosen), in_one_layer(chosen)
    anywhere.say("everywhere")
    local.say(f"in layer {LAYER} only")
    _CONSOLE.print(f"{time.monotonic() - start:.0f} s")
    if arguments.write:
        content = json.loads(PATH.read_text("utf-8")) if arguments.keep else {}
        content |= counts(anywhere, local) if arguments.keep else calibration(anywhere, local)
        PATH.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _CONSOLE.print(f"misfit_limit {content['misfit_limit']}")


def calibration(*tallies: Tally) -> dict[str, Any]:
    """The content of calibration.json."""
    wrong = min(each for tally in tallies for each in tally.wrong)
    right = sorted(each for tally in tallies for each in tally.right)
    below = [each for each in right if each.misfit < wrong.misfit]
    return {
        "misfit_limit": limit_between(below[-1], wrong),
        "largest_right": dataclasses.asdict(below[-1]),
        "smallest_wrong": dataclasses.asdict(wrong),
        "never_alike": [dataclasses.asdict(each) for each in right[len(below) :]],
        **counts(*tallies),
    }


def counts(*tallies: Tally) -> dict[str, int]:
    """What calibration.json says of its extent."""
    return {
        "right_names": sum(len(tally.right) for tally in tallies),
        "mutants": len(all_mutants()),
    }


def everywhere(chosen: slice) -> Tally:
    """Each bug as it is, by its own case."""
    oracle, cases, tally = Oracle(), all_cases(), Tally()
    known = KnownBugs(oracle)
    # Those of one case together: what it sees of the known bugs is remembered for a few cases.
    for name in sorted(known.mutants, key=lambda each: known.mutants[each].case)[chosen]:
        case = known.mutants[name].case
        subject = noisy(known.mutants[name])
        first = observe(cases[case], subject, oracle)
        if not first.failed:
            _CONSOLE.print(f"{name} passes {case} when it rounds")
            continue
        start = time.process_time()
        found = match(subject, first, known, seconds=float("inf"))
        tally.seconds.append(time.process_time() - start)
        tally.failed += 1
        names = found.matches[0].names if found.matches else ()
        if name in names and found.matches[0].fits:
            tally.named += 1
            if len(names) > 1:
                tally.alike.add(tuple(sorted(names)))
        else:
            tally.nearest += name in names
            shown = [(each.names, round(each.misfit, 4)) for each in found.matches]
            _CONSOLE.print(f"{name}, {case}: {shown}")
        like = names if name in names else (name,)
        misfits = dict(found.misfits)
        others = [each for each in misfits if each not in like]
        if others:  # what it would be called if it were not known itself
            other = min(others, key=lambda each: misfits[each])
            misfits[other] = known.beyond_blur(misfits[other], other, case)
        tally.note(name, case, misfits, like)
    return tally


def in_one_layer(chosen: slice) -> Tally:
    """The same for bugs in `LAYER` alone, of those that show there."""
    seen = Seen(GQA, Batch.of([row(tokens(23, 1)), row(tokens(17, 2), left=6)], 23), None)
    mutants, oracle, tally = all_mutants(), Oracle(), Tally()
    for name in _of_layers(chosen):
        prober = Prober(planted(mutants[name].kind, LAYER), "float32", oracle)  # type: ignore[arg-type]
        if not prober.fails(replace(seen, checkpoint=prefix(GQA, LAYER + 1))):
            continue
        tally.failed += 1
        start = time.process_time()
        found = ranked_in_layer(prober, seen, LAYER, mutants)
        tally.seconds.append(time.process_time() - start)
        like = found.like(name)
        names = found.like(found.best) if found.best else ()
        if name in names and found.misfits[name] <= misfit_limit():
            tally.named += 1
            if len(names) > 1:
                tally.alike.add(tuple(sorted(names)))
        else:
            tally.nearest += name in names
            _CONSOLE.print(f"{name} in layer {LAYER}: {names}")
        tally.note(name, f"layer {LAYER}", found.misfits, like)
    return tally


def _of_layers(chosen: slice) -> Iterator[str]:
    for name, mutant in list(all_mutants().items())[chosen]:
        if shows_in_a_layer(mutant):
            yield name


if __name__ == "__main__":
    main()
