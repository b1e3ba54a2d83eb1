"""False alarms: a profile of the conformance suite on right backends, with many fresh seeds.

    python bench/conformance_seeds.py --backends torch,flax --first 1 --seeds 500

Each seed draws weights, inputs and witnesses anew. Prints every failure, and at the end how many
seeds ran and the largest ratios, by backend. Exit code 1 if a case failed.
"""

import argparse
import sys
import time
from dataclasses import replace

from gemma_hub_conformance.engine import load_subject, run_conformance, select
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Report, Verdict

Worst = tuple[float, str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="torch,flax")
    parser.add_argument("--profile", default="core")
    parser.add_argument("--cases", default="", help="begin with one of these; with commas")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=500)
    arguments = parser.parse_args()
    subjects = [load_subject(name) for name in arguments.backends.split(",")]
    beginnings = tuple(arguments.cases.split(","))
    ids = [c.id for c in select(profile=arguments.profile) if c.id.startswith(beginnings)]
    worst: dict[str, Worst] = {}
    alarms, start = 0, time.monotonic()
    for done, seed in enumerate(range(arguments.first, arguments.first + arguments.seeds), 1):
        oracle = Oracle()  # of one seed, so that memory does not grow
        for subject in subjects:
            fresh = replace(subject, _models={})
            report = run_conformance(fresh, ids, seed=seed, oracle=oracle)
            alarms += _tell_failures(report)
            _note_worst(worst, report)
        if done % 10 == 0 or done == arguments.seeds:
            extremes = "; ".join(
                f"{name}: {ratio:.2f} ({case}, seed {at})"
                for name, (ratio, case, at) in sorted(worst.items())
            )
            seconds = time.monotonic() - start
            print(f"{done} seeds, {alarms} false alarms, {seconds:.0f} s; {extremes}", flush=True)
    sys.exit(1 if alarms else 0)


def _tell_failures(report: Report) -> int:
    failed = [each for each in report.results if each.verdict in (Verdict.FAIL, Verdict.ERROR)]
    for each in failed:
        print(f"seed {report.seed}, {report.backend}, {each.id}: {each.message}", flush=True)
    return len(failed)


def _note_worst(worst: dict[str, Worst], report: Report) -> None:
    for each in report.results:
        for kind in ("ratio", "worst_ratio"):
            value = getattr(each, kind)
            key = f"{report.backend} {kind}"
            if value is not None and value > worst.get(key, (0.0, "", 0))[0]:
                worst[key] = (value, each.id, report.seed)


if __name__ == "__main__":
    main()
