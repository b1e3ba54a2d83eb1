"""TokenClassifier: a checkpoint whose head says of each token which label it has."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.tasks.loaded_model import BATCH_SIZE, LoadedModel, checked_texts
from gemma_hub.tasks.probabilities import softmax


@dataclass(frozen=True, slots=True)
class Tag:
    """The label of one token.

    Attributes:
        label: the most probable one.
        start: first character of the token in its text.
        end: the character after its last. A character that is spelled by several tokens is in the
            span of each.
        text: the characters from start to end.
        token_id: the token.
        probability: of the label.
    """

    label: str
    start: int
    end: int
    text: str
    token_id: int
    probability: float


class TokenClassifier(LoadedModel):
    """A Gemma with a head over labels for each token; `config.id2label` names them.

    `forward` gives logits (B, T, num_labels).
    """

    task = "token_classification"

    def tag(self, texts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> list[list[Tag]]:
        """The tokens of each text with their labels; the <bos> that is put before it is left out.

        Args:
            texts: several texts.
            batch_size: texts that run at once.

        Raises:
            InputError: an argument is wrong.
            CapacityError: a text is longer than the model's positions.
            TokenizerError: the checkpoint has no tokenizer.
        """
        texts = checked_texts(texts)
        rows = self._encoded(texts)
        spans = [self._needed_tokenizer().encode_with_offsets(text)[1] for text in texts]
        tags: list[list[Tag]] = [[] for _ in rows]
        for places, _, outputs in self._batches(rows, batch_size):
            assert outputs.logits is not None
            for place, logits in zip(places, outputs.logits, strict=True):
                tags[place] = self._tags(texts[place], rows[place], spans[place], logits)
        return tags

    def _tags(
        self, text: str, ids: list[int], spans: list[tuple[int, int]], logits: np.ndarray
    ) -> list[Tag]:
        probabilities = softmax(logits[: len(ids)])
        best = probabilities.argmax(axis=-1)
        return [
            Tag(
                label=self.config.id2label[int(best[t])],
                start=spans[t][0],
                end=spans[t][1],
                text=text[slice(*spans[t])],
                token_id=ids[t],
                probability=float(probabilities[t, best[t]]),
            )
            for t in range(1, len(ids))
        ]
