"""ParityReport: what a comparison found, as data."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = "gemma-hub-parity/1"
TOKENS = "tokens"
"""The place of a divergence that only the generated tokens show."""
RUN = "run"
"""The place of a divergence of a backend that could not run at all."""

TokenVerdict = Literal["equal", "tie", "different"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One backend at one place of the model, over all texts.

    Attributes:
        ratio: error / rounding noise of the worst text; about 1 for a correct backend.
        worst_ratio: the same of the worst single element, against what is expected of so many.
        passed: both are within their limits for every text.
        reason: the error model's one line about the worst text.
    """

    ratio: float
    worst_ratio: float
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One place of the model: an entry of `hidden_states`, or the logits.

    Attributes:
        place: "embedding", "layer 0" ... , "final norm" or "logits".
        noise: relative error that rounding alone makes here, rms over texts and witnesses.
        band: smallest and largest error of any witness on any text, over that of the others: how
            far apart correct implementations are.
        cells: one per backend that ran, by name.
    """

    place: str
    noise: float
    band: tuple[float, float]
    cells: Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt and what the float64 reference makes of it.

    Attributes:
        prompt: the text, or its ids where it was given as ids.
        prompt_token_ids: what was fed.
        greedy_token_ids: the reference's greedy continuation.
        sampled_token_ids: the reference's continuation under the report's seed.
        greedy: that continuation as text; empty where there is no tokenizer.
        sampled: likewise.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...]
    greedy_token_ids: tuple[int, ...]
    sampled_token_ids: tuple[int, ...]
    greedy: str
    sampled: str


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """One backend's continuation of one prompt, held against the reference's.

    Attributes:
        backend: its name.
        kind: "greedy" or "sampled".
        text: index of the prompt in the report's texts.
        token_ids: what the backend generated.
        verdict: "equal"; "tie" where the first difference is between tokens that rounding alone can
            swap; "different" for any other difference.
        at: number of the first token that differs; None if none does.
        reason: one line that says why.
    """

    backend: str
    kind: Literal["greedy", "sampled"]
    text: int
    token_ids: tuple[int, ...]
    verdict: TokenVerdict
    at: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class BackendRun:
    """How one backend's run went.

    Attributes:
        name: of the backend.
        distribution: that ships it, and its version; empty if it could not be loaded.
        version: of that distribution.
        device: where it ran, in the framework's words.
        seconds: for building the model and running it, wall clock.
        error: why there is no result; empty if there is one.
    """

    name: str
    distribution: str = ""
    version: str = ""
    device: str = ""
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """Backends compared with the float64 reference.

    Attributes:
        source: the checkpoint, as it was asked for.
        config: its `config.json` values.
        dtype: compute type of the backends and of the rounding noise.
        backends: one per backend asked for, in that order.
        rows: one per place of the model, first to last; empty if no backend ran.
        tokens: every continuation held against the reference's.
        texts: the prompts and the reference's continuations.
        limits: {"ratio": ..., "worst_ratio": ...}, of the error model.
        seeds: {"sampling": ..., "witnesses": [...]}.
        sampling: the settings of the sampled continuations.
        versions: of Python and every distribution involved.
        created: when, in UTC, ISO 8601.
    """

    source: str
    config: Mapping[str, Any]
    dtype: str
    backends: tuple[BackendRun, ...]
    rows: tuple[Row, ...]
    tokens: tuple[TokenCheck, ...]
    texts: tuple[Text, ...]
    limits: Mapping[str, float]
    seeds: Mapping[str, Any]
    sampling: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str

    @property
    def passed(self) -> bool:
        """Whether every backend ran, stayed within the limits and gave the right tokens."""
        measured = bool(self.backends and self.rows and self.tokens)
        return measured and self.first_divergence is None

    @property
    def tokens_equal(self) -> bool:
        """Whether every token of every backend is the reference's, ties included."""
        return bool(self.tokens) and all(check.verdict == "equal" for check in self.tokens)

    @property
    def ties(self) -> int:
        """Number of continuations that part from the reference's where rounding decides."""
        return sum(check.verdict == "tie" for check in self.tokens)

    @property
    def first_divergence(self) -> tuple[str, str] | None:
        """(backend, place) that is wrong first in the order of the forward pass; None if none is.

        The place is that of a row, or "run" for a backend that failed, or "tokens" for one whose
        outputs are right and whose generated tokens are not.
        """
        order = {place: i for i, place in enumerate((RUN, *(r.place for r in self.rows), TOKENS))}
        found = self.divergences
        return min(found.items(), key=lambda item: order[item[1]]) if found else None

    @property
    def divergences(self) -> dict[str, str]:
        """{backend: its first wrong place} of every backend that has one."""
        places = {run.name: self._first_wrong_place(run) for run in self.backends}
        return {name: place for name, place in places.items() if place is not None}

    def _first_wrong_place(self, run: BackendRun) -> str | None:
        if run.error:
            return RUN
        wrong = (row.place for row in self.rows if not row.cells[run.name].passed)
        strays = (TOKENS for c in self.tokens if c.backend == run.name and c.verdict == "different")
        return next(wrong, None) or next(strays, None)

    @property
    def verdict(self) -> str:
        """How it went, in one sentence; if it failed, in one for each backend that is wrong."""
        if self.divergences:
            return " ".join(self._wrong(*found) for found in self.divergences.items())
        names = ", ".join(run.name for run in self.backends)
        worst = max((cell.ratio for row in self.rows for cell in row.cells.values()), default=0.0)
        return (
            f"{names}: every layer within {worst:.2f} times the {self.dtype} rounding noise "
            f"(limit {self.limits['ratio']:g}); {self._agreement()}."
        )

    def _wrong(self, backend: str, place: str) -> str:
        if place == RUN:
            error = next(run.error for run in self.backends if run.name == backend)
            return f"{backend} did not run: {error.rstrip('.')}."
        if place == TOKENS:
            check = next(
                c for c in self.tokens if c.backend == backend and c.verdict == "different"
            )
            where = f"{check.kind}, text {check.text}"
            return f"{backend} generates other tokens ({where}): {check.reason}."
        row = next(row for row in self.rows if row.place == place)
        return f"{backend} diverges first at {place}: {row.cells[backend].reason}."

    def _agreement(self) -> str:
        if not self.ties:
            return f"all {len(self.tokens)} continuations equal the float64 reference's"
        return (
            f"{len(self.tokens) - self.ties} of {len(self.tokens)} continuations equal the float64 "
            f"reference's, and {self.ties} part from it where rounding alone decides"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything above as JSON types; a number that is not finite is None."""
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "passed": self.passed,
            "verdict": self.verdict,
            "first_divergence": self.first_divergence,
            "divergences": self.divergences,
            "tokens_equal": self.tokens_equal,
        }
        for field in dataclasses.fields(self):
            values[field.name] = getattr(self, field.name)
        plain = _plain(values)
        assert isinstance(plain, dict)
        return plain

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to a file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with the verdict, a plot, the table and the texts."""
        from gemma_hub.parity.page import render

        Path(path).write_text(render(self), encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
