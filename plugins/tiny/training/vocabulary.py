"""The vocabulary: SentencePiece BPE with Gemma's settings and Gemma's special ids."""

import io
from collections.abc import Iterable

import sentencepiece

SIZE = 4096
CONTROL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
# In the order of their ids, from 4 on: as in Gemma 1.
USER_DEFINED = [
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    "\n",
    "\n\n",
]
IDS = CONTROL | {piece: 4 + i for i, piece in enumerate(USER_DEFINED)}


def train(texts: Iterable[str]) -> bytes:
    """A SentencePiece model, serialized. The same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # A paragraph per "sentence": the newlines between them are user-defined pieces anyway.
        sentence_iterator=(p for text in texts for p in text.split("\n") if p),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentence_length=1 << 20,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=USER_DEFINED,
        num_threads=1,
        minloglevel=2,
    )
    check(model.getvalue())
    return model.getvalue()


def load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def check(model: bytes) -> None:
    """Stop if a special piece has another id than in Gemma 1."""
    processor = load(model)
    wrong = {p: processor.piece_to_id(p) for p, i in IDS.items() if processor.piece_to_id(p) != i}
    if wrong or processor.get_piece_size() != SIZE:
        raise SystemExit(f"{processor.get_piece_size()} pieces, wrong ids: {wrong}; see IDS.")
