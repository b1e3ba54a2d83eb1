"""Compare GemmaTokenizer, GemmaTokenizerFast and sentencepiece on many random texts.

A long run of what test_tokenizers_pair.py does briefly:

    python tests/test_tokenizers/fuzz.py --strings 300000 --seed 1 path/to/tokenizer.model ...

Ids of all three, spans and decoded text of the two, with special tokens allowed and not. It prints
a line for each vocabulary and the first differences, and exits with 1 if there is one.
"""

import argparse
import sys
import time
from itertools import count
from pathlib import Path

import sentencepiece
from random_texts import FIXED, RandomTexts

from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

BATCH = 256


def differences(slow, fast, processor, texts: list[str]) -> list[str]:
    """The texts on which the three are not one."""
    wrong = set()
    for options in ({}, {"allow_special": False}):
        a = slow(texts, return_offsets_mapping=True, **options)
        b = fast(texts, return_offsets_mapping=True, **options)
        ids = fast(texts, **options).input_ids
        for i, text in enumerate(texts):
            same = a.input_ids[i] == b.input_ids[i] == ids[i]
            same = same and a.offset_mapping[i] == b.offset_mapping[i]
            same = same and slow.decode(ids[i]) == fast.decode(ids[i])
            if not same:
                wrong.add(text)
    names = slow.all_special_tokens
    plain = [text for text in texts if not any(name in text for name in names)]
    cut = fast(plain, add_special_tokens=False).input_ids
    wrong.update(t for t, i, j in zip(plain, cut, processor.encode(plain), strict=True) if i != j)
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for path in options.models:
        model = path.read_bytes()
        slow, fast = GemmaTokenizer(model), GemmaTokenizerFast(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        made = RandomTexts(list(slow.vocab), slow.all_special_tokens, options.seed)
        wrong = differences(slow, fast, processor, FIXED)
        start, done = time.monotonic(), len(FIXED)
        for batch in count():
            if done >= options.strings:
                break
            wrong += differences(slow, fast, processor, [made.text() for _ in range(BATCH)])
            done += BATCH
            if sys.stderr.isatty() and batch % 20 == 0:
                print(f"\r{done} texts, {len(wrong)} differ", end="", file=sys.stderr)  # noqa: T201
        library = fast.codec.engine.library
        seconds = time.monotonic() - start
        print(f"{path.name} ({library}): {done} texts, {len(wrong)} differ, {seconds:.0f} s")  # noqa: T201
        for text in wrong[:5]:
            print(f"  {text!r}\n    {slow.tokenize(text)}\n    {fast.tokenize(text)}")  # noqa: T201
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
