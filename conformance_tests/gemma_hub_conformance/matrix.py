"""Which mutant is killed by which case: `python -m gemma_hub_conformance.matrix`.

Every mutant runs every case that calls what is wrong in it, and matrix.json keeps what came of it,
a line for each mutant. A cell is computed again if the file of its mutant or of its case changed,
so that a run after a small change is short. The cells are as they are with seed 0.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from gemma_hub.cli.console import err, out, progress_bar
from gemma_hub.error_model import RATIO_LIMIT, WORST_RATIO_LIMIT
from gemma_hub.errors import InputError, nearest
from gemma_hub_conformance.called import Method, overridden, traced
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.engine import load_subject, run_case
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant
from gemma_hub_conformance.mutants.plugins import FAILING, NAME, PluginMutant, registry
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import CaseResult, Verdict
from gemma_hub_conformance.spec import CaseSpec, Subject

PATH = Path(__file__).with_name("matrix.json")

SURVIVES, FAILS, BREAKS, UNKNOWN = "..", "!!", "xx", "??"
"""Cells without a number: it passes; a condition that is no comparison fails; the case ends with an
exception; it was never run. Every other cell is how far the error is above the limit, in decibels
(10 is ten times the limit, 20 a hundred times), from 00 to 99."""

_MOST_SECONDS = 60.0  # that one case may take: a mutant that hangs shows it soon
_SAVED_EVERY = 10  # mutants


Bug = Mutant | PluginMutant


def known_bugs() -> dict[str, Bug]:
    """The rows: every mutant by its name, and every plug-in with a fault that can be loaded."""
    models = all_mutants()
    if models.keys() & FAILING.keys():
        raise RuntimeError("A mutant and a plug-in have one name.")
    return {**models, **FAILING}


def can_see(id_: str, bug: Bug) -> bool:
    """Whether a case meets what is wrong.

    A mutant runs in this process in the place of the installed reference, whose package is right. A
    plug-in with a fault has a model that is right.
    """
    if isinstance(bug, PluginMutant):
        return id_.startswith("L0.")
    return not id_.startswith("L0.package.")


@dataclass(frozen=True, slots=True)
class Killer:
    """A mutant that a case kills.

    Attributes:
        mutant: its name.
        cell: as in the matrix.
    """

    mutant: str
    cell: str

    @property
    def margin(self) -> float | None:
        """The error divided by the limit, to a quarter; None if the case fails without one."""
        return 10 ** (int(self.cell) / 10) if self.cell.isdigit() else None

    def __str__(self) -> str:
        if self.margin is None:
            return self.mutant
        return f"{self.mutant}, {self.margin:.2g} times the limit"


@dataclass
class Matrix:
    """The cells.

    Attributes:
        cases: for each case's id the digest of the file that it is in.
        mutants: likewise, by the mutant's name.
        cells: for each mutant and case what came of it.
    """

    cases: dict[str, str] = field(default_factory=dict)
    mutants: dict[str, str] = field(default_factory=dict)
    cells: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = PATH) -> "Matrix":
        """The matrix of a file; without one, an empty matrix."""
        if not path.exists():
            return cls()
        content = json.loads(path.read_text("utf-8"))
        found = cls(content["cases"], {name: line[0] for name, line in content["mutants"].items()})
        for name, (_, line) in content["mutants"].items():
            found.cells |= {
                (name, id_): line[2 * i : 2 * i + 2] for i, id_ in enumerate(found.cases)
            }
        return found

    def text(self) -> str:
        """The matrix as JSON, a line for each case and each mutant."""
        cases = [f"    {json.dumps(id_)}: {json.dumps(each)}" for id_, each in self.cases.items()]
        mutants = []
        for name, digest in self.mutants.items():
            line = "".join(self.cells.get((name, id_), UNKNOWN) for id_ in self.cases)
            mutants.append(f"    {json.dumps(name)}: {json.dumps([digest, line])}")
        parts = {"cases": cases, "mutants": mutants}
        return (
            "{\n"
            + ",\n".join(
                f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }" for name, lines in parts.items()
            )
            + "\n}\n"
        )

    def fitted(self, *, keep_changed: bool) -> "Matrix":
        """The matrix of today's cases and mutants, without the cells that may be others by now.

        Args:
            keep_changed: believe that no change of a file changed a cell.
        """
        cases = {id_: _digest(_module_of(case)) for id_, case in all_cases().items()}
        mutants = {name: _digest(_home_of(bug)) for name, bug in known_bugs().items()}
        same = {
            key: cell
            for key, cell in self.cells.items()
            if key[0] in mutants and key[1] in cases and cell != UNKNOWN
        }
        if not keep_changed:
            same = {
                (name, id_): cell
                for (name, id_), cell in same.items()
                if mutants[name] == self.mutants[name] and cases[id_] == self.cases[id_]
            }
        return Matrix(cases, mutants, same)

    def killers(self, id_: str) -> tuple[Killer, ...]:
        """The mutants that a case kills, the weakest first.

        That is the one whose error is least above the limit, then those that fail a condition, then
        those that raise.
        """
        alive = (SURVIVES, UNKNOWN)
        found = [
            Killer(name, self.cells.get((name, id_), UNKNOWN))
            for name in self.mutants
            if self.cells.get((name, id_), UNKNOWN) not in alive
        ]
        # In ASCII "!" is before the digits, and these before "x"; conditions belong in between.
        ranks = {FAILS: 1, BREAKS: 2}
        return tuple(sorted(found, key=lambda k: (ranks.get(k.cell, 0), k.cell, k.mutant)))

    def kills(self, mutant: str) -> tuple[str, ...]:
        """The cases that kill a mutant."""
        alive = (SURVIVES, UNKNOWN)
        return tuple(i for i in self.cases if self.cells.get((mutant, i), UNKNOWN) not in alive)

    def unknown(self) -> list[tuple[str, str]]:
        """The cells that were never run."""
        return [
            (name, id_)
            for name in self.mutants
            for id_ in self.cases
            if self.cells.get((name, id_), UNKNOWN) == UNKNOWN
        ]


@cache
def stored() -> Matrix:
    """The matrix of this version of the suite."""
    return Matrix.read()


def _module_of(case: CaseSpec) -> str:
    run = case.run
    while isinstance(run, partial):
        run = run.func
    return run.__module__


def _home_of(bug: Bug) -> str:
    return (bug.kind if isinstance(bug, Mutant) else type(bug)).__module__


@cache
def _digest(module: str) -> str:
    """Of a module's file."""
    file = sys.modules[module].__file__
    assert file
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


# -- one cell --------------------------------------------------------------------------------------


def run_cell(case: CaseSpec, subject: Subject, oracle: Oracle) -> str:
    """What comes of a case on a mutant."""
    if subject.harm:
        return SURVIVES  # another case killed it, and it is not run any more
    return cell_of(run_case(case, subject, oracle))


def cell_of(result: CaseResult) -> str:
    """The cell for a result."""
    if result.verdict is Verdict.ERROR:
        return BREAKS
    if result.verdict is not Verdict.FAIL:
        return SURVIVES
    above = margin(result)
    if not 1.0 < above < math.inf:
        return FAILS
    return f"{min(round(10 * math.log10(above)), 99):02}"


def margin(result: CaseResult) -> float:
    """How many times the limit the error of a case is; 0 if it compares nothing."""
    return max((result.ratio or 0.0) / RATIO_LIMIT, (result.worst_ratio or 0.0) / WORST_RATIO_LIMIT)


# -- all cells -------------------------------------------------------------------------------------

Row = tuple[str, tuple[str, ...]]
# Of the process; one that is forked has what its parent had.
_oracle = Oracle()
_called: dict[str, frozenset[Method]] = {}


def prepare(ids: Iterable[str]) -> None:
    """Run cases on a backend that is right: for what is right, and for what they call."""
    for id_ in ids:
        if not id_.startswith("L0.package."):
            called: set[Method] = set()
            cell = run_cell(all_cases()[id_], traced(called), _oracle)
            if cell != SURVIVES:
                raise RuntimeError(f"{id_} fails on a backend that is right.")
            _called[id_] = frozenset(called)


def run_row(row: Row) -> tuple[str, dict[str, str]]:
    """The cells of one mutant for some cases."""
    name, ids = row
    bug = known_bugs()[name]
    seen = tuple(id_ for id_ in ids if can_see(id_, bug))
    if isinstance(bug, Mutant):
        found = _cells([id_ for id_ in seen if _meets(id_, bug)], bug.subject)
    else:
        # What a plug-in does to a process ends with it.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found = pool.submit(_plugin_cells, name, seen).result() if seen else {}
    return name, {id_: found.get(id_, SURVIVES) for id_ in ids}


def _meets(id_: str, mutant: Mutant) -> bool:
    """Whether a case calls anything that a mutant overrides, as far as that is known."""
    methods = overridden(mutant)
    return methods is None or id_ not in _called or not methods.isdisjoint(_called[id_])


def _cells(ids: Sequence[str], subject: Callable[[], Subject]) -> dict[str, str]:
    cases, found, harm = all_cases(), {}, ""
    for id_ in ids:
        # A new one for each case: what a bug keeps from call to call is no matter of the case.
        each = subject()
        each.time_limit, each.harm = min(each.time_limit, _MOST_SECONDS), harm
        found[id_] = run_cell(cases[id_], each, _oracle)
        harm = each.harm
    return found


def _plugin_cells(name: str, ids: Sequence[str]) -> dict[str, str]:
    """Installs the plug-in in a folder; for a process that does nothing else."""
    with tempfile.TemporaryDirectory(prefix="gemma-hub-conformance-") as folder:
        sys.path.insert(0, folder)
        FAILING[name].install(Path(folder))
        subject = load_subject(NAME, registry(Path(folder)))
        # First of all what a new process shows: one that kills it is not run in this one.
        first = "L0.package.fresh_process"
        cells = _cells((first, *(id_ for id_ in ids if id_ != first)), lambda: subject)
        return {id_: cells[id_] for id_ in ids}


def run_rows(rows: Sequence[Row], jobs: int) -> Iterator[tuple[str, dict[str, str]]]:
    """The cells of several mutants, as they are done."""
    prepare(dict.fromkeys(id_ for _, ids in rows for id_ in ids))
    if jobs == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(run_row, rows)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(run_row, row) for row in rows]):
            yield done.result()


def fill(matrix: Matrix, wanted: Iterable[tuple[str, str]], jobs: int, path: Path) -> None:
    """Run the `wanted` cells; the file is written now and then, so that little is lost."""
    ids: dict[str, list[str]] = {}
    for name, id_ in wanted:
        ids.setdefault(name, []).append(id_)
    rows = [(name, tuple(each)) for name, each in ids.items()]
    with progress_bar() as progress:
        for done, (name, cells) in enumerate(run_rows(rows, jobs), 1):
            matrix.cells |= {(name, id_): cell for id_, cell in cells.items()}
            if progress:
                progress(name, done, len(rows))
            if done % _SAVED_EVERY == 0 or done == len(rows):
                _save(matrix, path)
                if not progress:
                    err().print(f"{done} of {len(rows)} mutants")


def _save(matrix: Matrix, path: Path) -> None:
    hidden = path.with_suffix(".part")
    hidden.write_text(matrix.text(), encoding="utf-8")
    hidden.replace(path)


# -- the command -----------------------------------------------------------------------------------


def changes(before: Matrix, after: Matrix) -> list[str]:
    """What differs between two matrices: mutants, cases, and what kills what."""
    lines = []
    for what, old, new in (
        ("mutant", before.mutants, after.mutants),
        ("case", before.cases, after.cases),
    ):
        lines += [f"new {what}: {key}" for key in new if key not in old]
        lines += [f"{what} gone: {key}" for key in old if key not in new]
    for name in after.mutants:
        if name in before.mutants:
            was, now = set(before.kills(name)), set(after.kills(name))
            lost = sorted((was - now) & after.cases.keys())
            won = sorted((now - was) & before.cases.keys())
            lines += [f"{name} is no longer killed by {', '.join(lost)}"] if lost else []
            lines += [f"{name} is now killed by {', '.join(won)}"] if won else []
    for id_ in after.cases:
        first, last = before.killers(id_)[:1], after.killers(id_)[:1]
        if id_ in before.cases and first != last:
            lines.append(f"{id_}: weakest was {_names(first)} and is {_names(last)}")
    return lines


def _names(killers: Iterable[Killer]) -> str:
    return ", ".join(map(str, killers)) or "none"


def problems(matrix: Matrix) -> list[str]:
    """What a complete matrix must not have; of one that is not, only that."""
    if unknown := len(matrix.unknown()):
        return [f"{unknown} cells were never run"]
    lines = [f"{id_} kills no mutant" for id_ in matrix.cases if not matrix.killers(id_)]
    for name, bug in known_bugs().items():
        if bug.case not in matrix.kills(name):
            lines.append(f"{name} is not killed by its own case {bug.case}")
    return lines


def _chosen(what: str, name: str | None, known: Mapping[str, object]) -> set[str]:
    if name is None:
        return set(known)
    if name not in known:
        raise InputError(f"There is no {what} {name!r}. {nearest(name, known)}".rstrip())
    return {name}


def main() -> int:
    """Bring matrix.json up to date and say what changed; 1 unless it is complete and right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutant", help="run this one only")
    parser.add_argument("--case", help="run this one only")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--all", action="store_true", help="run cells again that are known")
    mode.add_argument(
        "--only-missing", action="store_true", help="keep cells whose mutant or case was edited"
    )
    wanted = parser.parse_args()
    before = Matrix.read()
    matrix = before.fitted(keep_changed=wanted.only_missing)
    try:
        names = _chosen("mutant", wanted.mutant, matrix.mutants)
        ids = _chosen("case", wanted.case, matrix.cases)
    except InputError as error:
        parser.error(str(error))
    if wanted.all:
        matrix.cells = {
            (name, id_): cell
            for (name, id_), cell in matrix.cells.items()
            if not (name in names and id_ in ids)
        }
    cells = [(name, id_) for name, id_ in matrix.unknown() if name in names and id_ in ids]
    fill(matrix, cells, wanted.jobs, PATH)
    _save(matrix, PATH)
    for line in (*changes(before, matrix), *problems(matrix)):
        out().print(line, soft_wrap=True)
    out().print(f"{len(cells)} cells run, of {len(matrix.mutants)} x {len(matrix.cases)}.")
    return 1 if problems(matrix) else 0


if __name__ == "__main__":
    raise SystemExit(main())
