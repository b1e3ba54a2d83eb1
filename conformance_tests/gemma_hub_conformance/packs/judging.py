"""check_pack: outputs of a program judged by a pack, and the report of it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_hub.checkpoints.safetensors_file import StoredTensor
from gemma_hub.error_model import (
    RATIO_LIMIT,
    WORST_RATIO_LIMIT,
    Judgement,
    NoiseBand,
    judge,
)
from gemma_hub_conformance.packs.catalogue import LOGITS, OPEN, TensorSpec
from gemma_hub_conformance.packs.outputs import find_outputs
from gemma_hub_conformance.packs.reading import Unit, array_of, read_pack
from gemma_hub_conformance.packs.writing import checked_units


@dataclass(frozen=True, slots=True)
class TensorResult:
    """The verdict on one tensor.

    Attributes:
        name: in the pack.
        passed: it is right up to rounding.
        ratio: its error / the rounding noise; None for tokens.
        worst_ratio: the same of its worst element; None for tokens.
        reason: why, in one line.
        formula: how it is computed.
    """

    name: str
    passed: bool
    ratio: float | None
    worst_ratio: float | None
    reason: str
    formula: str


@dataclass(frozen=True, slots=True)
class UnitResult:
    """The verdict on one unit.

    Attributes:
        name: of the unit.
        results: one for each tensor that was given, in order of computation.
        not_given: tensors that were not.
        between: of those the ones computed after the last tensor that is right, and before the
            first that is wrong.
    """

    name: str
    results: tuple[TensorResult, ...]
    not_given: tuple[str, ...]
    between: tuple[str, ...]

    @property
    def first_wrong(self) -> TensorResult | None:
        """The first tensor, in order of computation, that is wrong."""
        return next((each for each in self.results if not each.passed), None)

    @property
    def has_logits(self) -> bool:
        """Whether logits were compared; without them the unit proves nothing."""
        return any(each.name == LOGITS for each in self.results)


@dataclass(frozen=True, slots=True)
class PackReport:
    """What came of judging outputs.

    Attributes:
        units: of each unit that outputs were given of.
        needed: units whose logits must be compared; several lists where one of them is enough.
    """

    units: tuple[UnitResult, ...]
    needed: tuple[tuple[str, ...], ...]

    @property
    def failed(self) -> bool:
        """Whether a tensor is wrong."""
        return any(unit.first_wrong for unit in self.units)

    @property
    def missing(self) -> tuple[str, ...]:
        """Units whose logits are missing: of the list that is nearest to being complete."""
        given = {unit.name for unit in self.units}
        lists = [tuple(name for name in names if name not in given) for names in self.needed]
        without = tuple(unit.name for unit in self.units if not unit.has_logits)
        return tuple(dict.fromkeys((*without, *min(lists, key=len))))

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 5 too little was compared."""
        return 1 if self.failed else 5 if self.missing else 0

    @property
    def summary(self) -> str:
        """One line: the verdict and the coverage."""
        judged = [each for unit in self.units for each in unit.results]
        right = sum(each.passed for each in judged)
        names = ", ".join(unit.name for unit in self.units) or "none"
        what = f"{right} of {len(judged)} tensors are right, units: {names}"
        if self.failed:
            return f"WRONG: {what}"
        if self.missing:
            return f"VACUOUS: {what}; there are no logits of {', '.join(self.missing)}"
        return f"RIGHT: {what}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a ratio that is not finite becomes a string."""
        return {
            "exit_code": self.exit_code,
            "summary": self.summary,
            "missing": list(self.missing),
            "units": [
                {
                    "name": unit.name,
                    "first_wrong": unit.first_wrong.name if unit.first_wrong else None,
                    "not_given": list(unit.not_given),
                    "between": list(unit.between),
                    "tensors": [_plain(each) for each in unit.results],
                }
                for unit in self.units
            ],
        }

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def print(self, console: Console) -> None:
        """A table for each unit, the first wrong tensor of each, and the summary."""
        for unit in self.units:
            console.print(_table(unit))
        for unit in self.units:
            if unit.first_wrong:
                console.print(_finding(unit), markup=False, highlight=False, soft_wrap=True)
        style = "red" if self.exit_code else "green"
        console.print(self.summary, style=style, markup=False, highlight=False, soft_wrap=True)


def check_pack(
    folder: str | Path,
    outputs: str | Path,
    only: Sequence[str] = (),
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> PackReport:
    """Judge outputs by a pack, with its own noise: no reference and no witness runs.

    Args:
        folder: the pack.
        outputs: a folder or a file, see `find_outputs`.
        only: units to judge; the verdict is then on these alone. Without it the logits of every
            model are needed, in one of the pack's types at least.
        progress: told (unit, number done, number of all).

    Raises:
        InputError: the pack or the outputs cannot be read, or do not fit one another.
    """
    golden = read_pack(folder)
    chosen = checked_units(only, dict(golden.units)) if only else list(golden.units)
    found = find_outputs(outputs, golden)
    given = [name for name in chosen if name in found]
    results = []
    for number, name in enumerate(given):
        if progress:
            progress(name, number, len(given))
        results.append(_judge_unit(golden.unit(name), found[name]))
    needed = [tuple(chosen)]
    if not only:
        dtypes = dict.fromkeys(str(entry.get("dtype")) for entry in golden.units.values())
        needed = [
            tuple(name for name, entry in golden.units.items() if entry.get("dtype") == dtype)
            for dtype in dtypes
        ]
    return PackReport(tuple(results), tuple(needed))


def _judge_unit(unit: Unit, outputs: dict[str, StoredTensor]) -> UnitResult:
    results = tuple(
        _judge_tensor(unit, spec, array_of(outputs[name]))
        for name, spec in unit.specs.items()
        if name in outputs
    )
    return UnitResult(
        unit.name,
        results,
        tuple(name for name in unit.specs if name not in outputs),
        _between(list(unit.specs), results),
    )


def _between(order: list[str], results: Sequence[TensorResult]) -> tuple[str, ...]:
    """Names in `order` just before the first result that is wrong, back to the one before it."""
    start = 0
    for each in results:
        if not each.passed:
            return tuple(order[start : order.index(each.name)])
        start = order.index(each.name) + 1
    return ()


def _judge_tensor(unit: Unit, spec: TensorSpec, found: np.ndarray) -> TensorResult:
    expected = unit.expected[spec.name]
    if spec.vectors == "exact":
        return _compare_tokens(spec, found, expected)
    vectors, true = (spec.as_vectors(each, unit.mask) for each in (found, expected))
    band = unit.bands[spec.name]
    worst: tuple[Judgement, int] | None = None
    ratios = []
    for part in spec.rows(unit.mask):
        # Squares of what is far off may be past the range; infinity is the right word for them.
        with np.errstate(over="ignore", invalid="ignore"):
            judgement = judge(vectors[part], true[part], _of_row(band, part))
        ratios.append((judgement.ratio, judgement.worst_ratio))
        if worst is None or _badness(judgement) > _badness(worst[0]):
            worst = judgement, part.start or 0
    assert worst is not None, "a batch has rows"
    judgement, start = worst
    reason = judgement.reason
    if judgement.worst_index is not None:
        vector, element = judgement.worst_index
        place = list(spec.place(start + vector, element, unit.mask))
        reason = f"{reason.rpartition(' at ')[0]} at {place}"
    ratio, worst_ratio = (max(each) for each in zip(*ratios, strict=True))
    return TensorResult(spec.name, judgement.passed, ratio, worst_ratio, reason, spec.formula)


def _of_row(band: NoiseBand, part: slice) -> NoiseBand:
    vectors = band.token_rms[part]
    rms = float(np.sqrt(np.mean(np.square(vectors))))
    return NoiseBand(rms, vectors, band.element_rms[part], ())


def _badness(judgement: Judgement) -> float:
    """How far over its limit the worse of the two ratios is; below 1 if it passes."""
    badness = max(judgement.ratio / RATIO_LIMIT, judgement.worst_ratio / WORST_RATIO_LIMIT)
    return math.inf if math.isnan(badness) else badness


def _compare_tokens(spec: TensorSpec, found: np.ndarray, expected: np.ndarray) -> TensorResult:
    different = np.argwhere((expected != OPEN) & (found != expected))
    reason = f"all {np.count_nonzero(expected != OPEN)} tokens that rounding cannot change agree"
    if len(different):
        place = tuple(int(i) for i in different[0])
        reason = (
            f"{len(different)} tokens differ; that at {list(place)} is {found[place]}, expected "
            f"{expected[place]}"
        )
    return TensorResult(spec.name, not len(different), None, None, reason, spec.formula)


def _finding(unit: UnitResult) -> str:
    """Where the outputs of one unit leave the pack."""
    wrong = unit.first_wrong
    assert wrong is not None, "called for a unit that is wrong"
    lines = [f"{unit.name}: the first tensor that is wrong is {wrong.name}: {wrong.reason}."]
    lines.append(f"  {wrong.name} = {wrong.formula}")
    if unit.between:
        lines.append(
            f"  Not given, and computed just before it: {', '.join(unit.between)}. Add them to see "
            "which is the first."
        )
    return "\n".join(lines)


def _table(unit: UnitResult) -> Table:
    table = Table(title=unit.name, title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("error / noise", justify="right")
    table.add_column("worst element", justify="right")
    table.add_column("")
    first = unit.first_wrong
    for each in unit.results:
        verdict = "right" if each.passed else "WRONG"
        verdict += ", the first" if each is first else ""
        ratios = (_number(each.ratio), _number(each.worst_ratio))
        table.add_row(each.name, *ratios, Text(verdict, "green" if each.passed else "red"))
    return table


def _plain(result: TensorResult) -> dict[str, Any]:
    record = {name: getattr(result, name) for name in result.__dataclass_fields__}
    for name in ("ratio", "worst_ratio"):
        if record[name] is not None and not math.isfinite(record[name]):
            record[name] = str(record[name])
    return record


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
