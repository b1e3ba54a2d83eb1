"""From arrays to a report's rows and token checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import Judgement, judge
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parity.candidates import Candidate, place_names
from gemma_hub.parity.reference import Trajectory, Truth
from gemma_hub.parity.report import Cell, Row, TokenCheck, TokenVerdict
from gemma_hub.parity.tokens import Step, compare_at, first_difference


@dataclass(slots=True)
class _Place:
    """What has been measured at one place so far."""

    square_noise: float = 0.0
    tokens: int = 0
    witness_ratios: list[float] = field(default_factory=list)
    judgements: dict[str, list[tuple[Trajectory, Judgement]]] = field(default_factory=dict)


class Judging:
    """Collects the judgement of every candidate, trajectory by trajectory.

    Args:
        config: the model's.
        candidates: those that ran.
        settings: {"greedy": ..., "sampled": ...}.
    """

    def __init__(
        self,
        config: GemmaConfig,
        candidates: Sequence[Candidate],
        settings: dict[str, GenerationSettings],
    ) -> None:
        self._candidates, self._settings = candidates, settings
        self._places = {name: _Place() for name in place_names(config)}
        self._checks: list[TokenCheck] = []

    def add(self, row: int, trajectory: Trajectory, truth: Truth) -> None:
        """Judge one trajectory, which is row `row` of the candidates' batch."""
        length = len(trajectory.token_ids)
        for number, place in enumerate(self._places.values()):
            true, band = truth.places[number], truth.bands[number]
            place.square_noise += band.rms**2 * length
            place.tokens += length
            place.witness_ratios += band.witness_ratios
            for candidate in self._candidates:
                found = candidate.places[number][row : row + 1, -length:]
                judgements = place.judgements.setdefault(candidate.run.name, [])
                judgements.append((trajectory, judge(found, true, band)))
        self._checks += [self._check(c, trajectory, truth) for c in self._candidates]

    def rows(self) -> tuple[Row, ...]:
        """One row per place, over everything added."""
        return tuple(
            Row(
                place=name,
                noise=math.sqrt(place.square_noise / place.tokens),
                band=(min(place.witness_ratios), max(place.witness_ratios)),
                cells={backend: _cell(found) for backend, found in place.judgements.items()},
            )
            for name, place in self._places.items()
        )

    def checks(self) -> tuple[TokenCheck, ...]:
        """Every continuation checked, by backend, kind and text."""
        order = {candidate.run.name: i for i, candidate in enumerate(self._candidates)}
        return tuple(sorted(self._checks, key=lambda c: (order[c.backend], c.kind, c.text)))

    def _check(self, candidate: Candidate, trajectory: Trajectory, truth: Truth) -> TokenCheck:
        rows = candidate.greedy if trajectory.kind == "greedy" else candidate.sampled
        found, expected = rows[trajectory.text], trajectory.continuation
        at = first_difference(expected, found)
        verdict: TokenVerdict
        if at is None:
            verdict, reason = "equal", f"all {len(expected)} tokens are the reference's"
        elif at >= min(len(found), len(expected)):
            verdict = "different"
            reason = f"it stops after {len(found)} tokens and the reference after {len(expected)}"
        else:
            # The logits at position p say which token comes at p + 1.
            position = len(trajectory.prompt) + at - 1
            step = Step(
                logits=truth.places[-1][0, position],
                noise=truth.bands[-1].element_rms[position],
                row=trajectory.text,
                index=at,
            )
            settings = self._settings[trajectory.kind]
            verdict, reason = compare_at(step, expected[at], found[at], settings)
        return TokenCheck(
            candidate.run.name, trajectory.kind, trajectory.text, found, verdict, at, reason
        )


def _cell(found: list[tuple[Trajectory, Judgement]]) -> Cell:
    """One cell from the judgements of all trajectories: each number is that of the worst."""
    trajectory, worst = max(
        found, key=lambda pair: (not pair[1].passed, pair[1].ratio, pair[1].worst_ratio)
    )
    return Cell(
        ratio=max(judgement.ratio for _, judgement in found),
        worst_ratio=max(judgement.worst_ratio for _, judgement in found),
        passed=all(judgement.passed for _, judgement in found),
        reason=f"text {trajectory.text}, {trajectory.kind}: {worst.reason}",
    )
