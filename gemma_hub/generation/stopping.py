"""A row's text as it grows, and the stop texts in it."""

import copy
from collections.abc import Sequence
from typing import Self

from gemma_hub.tokenizers import IncrementalDecoder


class StoppedText:
    """Decodes a row's new tokens and looks for stop texts, across the borders of tokens.

    A row stops at the character with which the first stop text is complete, whatever tokens it came
    in; of several that are complete there the longest counts. What might be the beginning of one is
    held back until it is certain.

    Attributes:
        text: what is certain so far; it ends before the stop text.
        is_stopped: whether a stop text has come.
    """

    def __init__(self, decoder: IncrementalDecoder, stops: Sequence[str]) -> None:
        """A text that has nothing yet.

        Args:
            decoder: at the start of a text.
            stops: the stop texts, none of them empty.
        """
        self.text = ""
        self.is_stopped = False
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""

    def copy(self) -> Self:
        """The same text, which then goes on by itself."""
        made = copy.copy(self)
        made._decoder = self._decoder.copy()
        return made

    def push(self, token_id: int) -> str:
        """What becomes certain with `token_id`; nothing once the text is stopped."""
        return self._certain(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest of the text; nothing if it is stopped."""
        return self._certain(self._decoder.finish(), is_last=True)

    def _certain(self, more: str, *, is_last: bool = False) -> str:
        if self.is_stopped:
            return ""
        held = self._held + more
        # The first occurrence of each; the smallest end counts, and then the smallest start.
        found = [(held.index(stop) + len(stop), held.index(stop))
                 for stop in self._stops if stop in held]  # fmt: skip
        if found:
            self.is_stopped = True
            end = min(found)[1]
        else:
            end = len(held) if is_last else len(held) - self._begun(held)
        piece, self._held = held[:end], held[end:]
        self.text += piece
        return piece

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop text."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
