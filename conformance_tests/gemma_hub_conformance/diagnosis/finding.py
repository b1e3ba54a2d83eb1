"""What a diagnosis says."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gemma_hub_conformance.diagnosis.reproduction import Failure


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One cause of failures.

    Attributes:
        case: the failing case that was looked into.
        mutant: the known bug; None if none fits. If several cannot be told apart, the first; the
            text names them all.
        alignment: cosine between the backend's errors and those of `mutant`, or of the nearest
            known bug if none fits; None if the case compared no numbers.
        advice: what to do, in one line.
        layer: the first wrong layer; None if what is around the layers is wrong, or it was not
            found.
        branch: the part that is wrong: "attention", "feed-forward", "norm", "embedding", "head",
            "residual stream", "loss", "generation", "state between calls", or several of them in
            words; None if it was not found.
        shortest_input: the ids of the shortest input whose logits or gradients are wrong, or that
            raises, row after row; empty if no input fails by itself.
        exception: what the backend raised, if that is how the case ended; else empty.
        raised_in: file, line and function of the backend's own code that it was raised in.
        takes: what the exception takes beside an input, such as "`tie_word_embeddings=False`".
        text: all of this for a reader, several lines.
        failure: what `write_reproduction` writes; None if there is no shortest input.
    """

    case: str
    mutant: str | None
    alignment: float | None
    advice: str
    layer: int | None
    branch: str | None
    shortest_input: tuple[int, ...]
    text: str
    exception: str = ""
    raised_in: str = ""
    takes: tuple[str, ...] = ()
    failure: Failure | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON types."""
        names = [each.name for each in dataclasses.fields(self) if each.name != "failure"]
        plain = {name: getattr(self, name) for name in names}
        lists = {"shortest_input": list(self.shortest_input), "takes": list(self.takes)}
        return plain | lists
