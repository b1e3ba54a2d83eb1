"""Compare GemmaTokenizer, GemmaTokenizerFast and sentencepiece on many random texts.

A long run of what test_tokenizers_pair.py does briefly:

    python tests/test_tokenizers/fuzz.py --strings 300000 --seed 1 [MODEL ...]

A MODEL is a path, or a name that conftest.py has; without one, all of those are compared. It prints
what was counted for each and the first differences, and exits with 1 if there is one:

- ids, spans and decoded text of the two, with special tokens allowed and not, one by one and many
  in one call;
- ids and decoded text of sentencepiece itself, where a text spells no special token;
- that plain text comes back from its ids, and that spans follow one another without a gap and hold
  what their tokens spell, where a vocabulary keeps texts as they are;
- what random ids decode to, in all three.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from random_texts import FIXED, RandomTexts

from conftest import FILES, TRAINED, vocabulary
from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast
from gemma_hub.tokenizers.model_file import read_model_file

BATCH = 250


class Comparison:
    """One vocabulary in three hands, and what was counted."""

    def __init__(self, model: bytes) -> None:
        self.slow = GemmaTokenizer(model)
        self.fast = GemmaTokenizerFast(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.counts: Counter[str] = Counter()
        codec = self.fast.codec
        self.keeps_text = codec.engine.library == "tokenizers"  # it runs no other vocabularies
        self.is_lossless = self.keeps_text and bool(codec.vocabulary.bytes)
        self.names = self.slow.all_special_tokens
        # sentencepiece drops every space that a text begins with then, and not only its own.
        self.drops_spaces = read_model_file(model).removes_spaces

    def differences(self, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """What differs, and the text."""
        self.counts["texts"] += len(texts)
        for allow_special in (True, False):
            asked = {"add_special_tokens": False, "allow_special": allow_special}
            slow = self.slow(texts, return_offsets_mapping=True, **asked)
            fast = self.fast(texts, return_offsets_mapping=True, **asked)
            ids = slow.input_ids
            self.counts["ids"] += sum(map(len, ids))
            yield from self._unequal("ids", texts, ids, fast.input_ids)
            yield from self._unequal("spans", texts, slow.offset_mapping, fast.offset_mapping)
            # Without spans the libraries are called in another way, for all texts at once.
            yield from self._unequal("ids", texts, ids, self.fast(texts, **asked).input_ids)
            yield from self._unequal("ids", texts, ids, self.slow(texts, **asked).input_ids)
            decoded = self.fast.batch_decode(ids)
            yield from self._unequal("decoded", texts, self.slow.batch_decode(ids), decoded)
            if self.is_lossless and not allow_special:
                yield from self._unequal("come back", texts, texts, decoded)
            if self.keeps_text:
                tiled = [self._tiled(*row) for row in zip(texts, ids, slow.offset_mapping)]  # noqa: B905
                yield from self._unequal("spans tile", texts, [True] * len(texts), tiled)
            if allow_special:
                yield from self._against_sentencepiece(texts, ids, decoded)

    def _against_sentencepiece(
        self, texts: Sequence[str], ids: Sequence[list[int]], decoded: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        whole = list(zip(texts, ids, decoded, strict=True))
        rows = [row for row in whole if not any(name in row[0] for name in self.names)]
        same = [row[0] for row in rows]
        theirs = self.processor.encode(same)
        yield from self._unequal("ids sentencepiece", same, [row[1] for row in rows], theirs)
        known = [row for row in rows if self.slow.unk_token_id not in row[1]]
        same, ours = [row[0] for row in known], [row[2] for row in known]
        theirs = [self.processor.decode(row[1]) for row in known]
        if self.drops_spaces:
            ours, theirs = [text.lstrip(" ") for text in ours], [t.lstrip(" ") for t in theirs]
        yield from self._unequal("decoded sentencepiece", same, ours, theirs)

    def decoding(self, rows: Sequence[list[int]]) -> Iterator[tuple[str, str]]:
        """What differs when ids are decoded that no text gives, and the ids."""
        names = list(map(str, rows))
        slow, fast = self.slow.batch_decode(rows), self.fast.batch_decode(rows)
        yield from self._unequal("decoded random", names, slow, fast)
        if self.keeps_text:
            plain = [[i for i in row if i not in self.slow.special_token_ids] for row in rows]
            theirs = list(map(self.processor.decode, plain))
            ours = self.fast.batch_decode(rows, skip_special_tokens=True)
            yield from self._unequal("decoded random sentencepiece", names, ours, theirs)

    def _unequal(
        self, what: str, texts: Sequence[str], ours: Sequence[object], theirs: Sequence[object]
    ) -> Iterator[tuple[str, str]]:
        self.counts[what] += len(texts)
        for text, a, b in zip(texts, ours, theirs, strict=True):
            if a != b:
                yield what, text

    def _tiled(self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> bool:
        place, last, codec = 0, None, self.slow.codec
        for token_id, span in zip(ids, spans, strict=True):
            spelled = text[slice(*span)]
            if token_id in codec.vocabulary.bytes:
                if codec.vocabulary.bytes[token_id] not in spelled.encode() or len(spelled) != 1:
                    return False
            elif token_id != self.slow.unk_token_id:
                piece = codec.piece(token_id)
                if spelled != piece and spelled.replace(" ", "▁") != piece:
                    return False
            if span[0] != place and span != last:
                return False
            place, last = span[1], span
        return place == len(text)


def compare(name: str, model: bytes, strings: int, seed: int) -> int:
    """Print what `strings` random texts show; the number of differences."""
    start = time.monotonic()
    it = Comparison(model)
    made = RandomTexts(it.slow.vocab, it.names, seed)
    wrong = list(it.differences(FIXED))
    while it.counts["texts"] < strings + len(FIXED):
        size = min(BATCH, strings + len(FIXED) - it.counts["texts"])
        wrong += it.differences([made.text() for _ in range(size)])
        wrong += it.decoding([made.ids(len(it.slow)) for _ in range(size // 5)])
        if sys.stderr.isatty():
            done = f"\r{name}: {it.counts['texts']} texts, {len(wrong)} differ "
            print(done, end="", file=sys.stderr, flush=True)  # noqa: T201
    seconds = time.monotonic() - start
    library = it.fast.codec.engine.library
    print(f"\r{name} (sentencepiece and {library}): {len(wrong)} differ, {seconds:.0f} s")  # noqa: T201
    print("  " + ", ".join(f"{what} {count}" for what, count in it.counts.items()), flush=True)  # noqa: T201
    for what, text in wrong[:5]:
        print(f"  {what}: {text!r:.300}")  # noqa: T201
        for tokenizer in (it.slow, it.fast) if "random" not in what else ():
            for allow in (True, False):
                ids, spans = tokenizer.encode_with_offsets(text, False, allow)
                print(f"    {tokenizer.convert_ids_to_tokens(ids)} {spans}"[:600])  # noqa: T201
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*TRAINED, *FILES], metavar="MODEL")
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = 0
    for name in options.models:
        known = name in TRAINED or name in FILES
        model = vocabulary(name) if known else Path(name).read_bytes()
        if model is None:
            print(f"{name}: it is not here")  # noqa: T201
            continue
        try:
            total += compare(name, model, options.strings, options.seed)
        except TokenizerError as error:
            print(f"{name}: {error}")  # noqa: T201
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
