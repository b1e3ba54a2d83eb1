"""Records what the tokenizers of Transformers 4 make of texts, in transformers_4.json.

Run by hand, in an environment of its own, since Transformers 4 and 5 exclude one another:

    pip install transformers==4.57.6 sentencepiece protobuf
    python tests/test_tokenizers/record_transformers_4.py NAME=FOLDER [NAME=FOLDER ...]

Each folder holds a tokenizer.model and nothing else.
"""

import json
import sys
from pathlib import Path

import transformers
from random_texts import FIXED


def recorded(folder: str) -> list[dict]:
    slow = transformers.GemmaTokenizer.from_pretrained(folder)
    fast = transformers.GemmaTokenizerFast.from_pretrained(folder)
    rows = []
    for text in FIXED:
        both = fast(text, return_offsets_mapping=True)
        row = {
            "text": text,
            "slow": slow(text).input_ids,
            "fast": both.input_ids,
            "spans": both.offset_mapping,
            "decoded": slow.decode(slow(text).input_ids),
        }
        rows.append(row)
    return rows


def main() -> None:
    folders = dict(argument.split("=", 1) for argument in sys.argv[1:])
    record = {"transformers": transformers.__version__}
    record |= {name: recorded(folder) for name, folder in folders.items()}
    path = Path(__file__).with_name("transformers_4.json")
    path.write_text(json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
