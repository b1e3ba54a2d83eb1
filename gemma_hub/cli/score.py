"""`gemma-hub score`: how probable each text is."""

import dataclasses
from typing import TYPE_CHECKING, cast

from gemma_hub.cli import texts as shared
from gemma_hub.cli.console import waiting

if TYPE_CHECKING:
    from gemma_hub.tasks.causal_lm import CausalLM


def score(
    source: shared.Source,
    texts: shared.Texts,
    backend: shared.Backend = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Score texts: a line for each with its log-probability, its number of tokens and the text."""
    given = shared.read_texts(texts)
    model = cast("CausalLM", shared.loaded(source, "causal_lm", backend, dtype, device))
    with waiting("Scoring"):
        results = model.score(given)
    if as_json:
        records = [
            {"text": text, **dataclasses.asdict(result)}
            for text, result in zip(given, results, strict=True)
        ]
        shared.write_record(source, model, records)
        return
    for text, result in zip(given, results, strict=True):
        shared.write_row(f"{result.total:.4f}", len(result.token_ids), text)
