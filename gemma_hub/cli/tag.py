"""`gemma-hub tag`: the label of each token of each text."""

import dataclasses
import json
from typing import TYPE_CHECKING, cast

from gemma_hub.cli import texts as shared
from gemma_hub.cli.console import waiting, write

if TYPE_CHECKING:
    from gemma_hub.tasks.token_classification import TokenClassifier


def tag(
    source: shared.Source,
    texts: shared.Texts,
    backend: shared.Backend = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Label the tokens of texts: a line for each with span, label, probability and characters.

    An empty line stands between two texts.
    """
    given = shared.read_texts(texts)
    model = cast(
        "TokenClassifier", shared.loaded(source, "token_classification", backend, dtype, device)
    )
    with waiting("Tagging"):
        results = model.tag(given)
    if as_json:
        records = [
            {"text": text, "tags": [dataclasses.asdict(one) for one in tags]}
            for text, tags in zip(given, results, strict=True)
        ]
        shared.write_record(source, model, records)
        return
    for place, tags in enumerate(results):
        if place:
            write("\n")
        for one in tags:
            characters = json.dumps(one.text, ensure_ascii=False)  # so that spaces are seen
            shared.write_row(one.start, one.end, one.label, f"{one.probability:.4f}", characters)
