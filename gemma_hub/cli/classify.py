"""`gemma-hub classify`: the label of each text."""

import dataclasses
from typing import TYPE_CHECKING, cast

from gemma_hub.cli import texts as shared
from gemma_hub.cli.console import waiting

if TYPE_CHECKING:
    from gemma_hub.tasks.sequence_classification import SequenceClassifier


def classify(
    source: shared.Source,
    texts: shared.Texts,
    backend: shared.Backend = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Label texts: a line for each with its label, the label's probability and the text."""
    given = shared.read_texts(texts)
    model = cast(
        "SequenceClassifier",
        shared.loaded(source, "sequence_classification", backend, dtype, device),
    )
    with waiting("Classifying"):
        results = model.classify(given)
    if as_json:
        records = [
            {"text": text, **dataclasses.asdict(result)}
            for text, result in zip(given, results, strict=True)
        ]
        shared.write_record(source, model, records)
        return
    for text, result in zip(given, results, strict=True):
        if result.label is None or result.probability is None:
            values = " ".join(f"{name}={value:.4f}" for name, value in result.values.items())
            shared.write_row(values, text)
        else:
            shared.write_row(result.label, f"{result.probability:.4f}", text)
