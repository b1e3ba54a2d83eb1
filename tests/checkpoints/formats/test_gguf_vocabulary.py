"""The vocabulary in a GGUF: there and back, and out of files that llama.cpp's converter wrote."""

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from gemma_hub import GemmaTokenizer
from gemma_hub.checkpoints.formats.gguf import Gguf
from gemma_hub.checkpoints.formats.gguf_vocabulary import read_pieces, vocabulary_model
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

ROOT = Path(__file__).parents[3]
TINY = ROOT / "plugins/tiny/gemma_hub_tiny/checkpoint/tokenizer.model"
LARGE = ROOT.parent / "shared/data/tokenizer/gemma1/tokenizer.rebuilt.model"
TALES = ROOT.parent / "shared/data/corpus/fairy_tales.txt"

Make = Callable[..., Opened]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(opened: Opened, folder: Path, **files: Path) -> Path:
    """The file alone, as it is when it goes to another machine; `files` in place of the fake."""
    folder.mkdir()
    named = {name.replace("__", "."): path for name, path in files.items()}
    Gguf().write(folder, dataclasses.replace(opened, files=named), WriteOptions())
    alone = folder / "alone"
    alone.mkdir()
    return (folder / "model.gguf").rename(alone / "model.gguf")


def encoder(model: Path | bytes) -> sentencepiece.SentencePieceProcessor:
    content = model if isinstance(model, bytes) else model.read_bytes()
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def small_model(folder: Path) -> Path:
    """A vocabulary of fewer pieces than the test models have rows."""
    path = folder / "small.model"
    if not path.is_file():
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["abc abd abe", "bac bad bae"] * 9),
                model_writer=file, model_type="bpe", vocab_size=20, pad_id=0, eos_id=1, bos_id=2,
                unk_id=3, add_dummy_prefix=False, remove_extra_whitespaces=False,
                user_defined_symbols=["<end_of_turn>", "\u2581" * 2], minloglevel=9,
                normalization_rule_name="identity", pad_piece="<pad>", eos_piece="<eos>",
                bos_piece="<bos>",
            )  # fmt: skip
    return path


def texts_to_encode(count: int = 2000) -> list[str]:
    tales = TALES.read_text("utf-8") if TALES.is_file() else "Once upon a time. " * 9999
    extra = (
        "  spaces   \n\ttabs\n\n <start_of_turn>user\nhi<end_of_turn> é 漢字 🙂 \x00 12345 \u2581"
    )
    step = max(1, (len(tales) - 90) // count)
    return [tales[i * step : i * step + 90] + extra[i % 40 :] for i in range(count)]


@pytest.mark.parametrize("source", [TINY, LARGE], ids=["tiny", "256k"])
def test_the_vocabulary_comes_back(make_opened: Make, tmp_path: Path, source: Path) -> None:
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    original = encoder(source)
    opened = make_opened("mqa", "bfloat16", vocab_size=original.get_piece_size())
    path = written(opened, tmp_path / "out", tokenizer__model=source)
    start = time.process_time()
    found = Gguf().open(path)
    taken = time.process_time() - start
    assert not found.notes
    model = found.files["tokenizer.model"]
    back = encoder(model)
    texts = texts_to_encode()
    assert back.encode(texts) == original.encode(texts)
    assert back.decode(back.encode(texts)) == original.decode(original.encode(texts))
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(back, name)() == getattr(original, name)()
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    (alone / "tokenizer.model").write_bytes(model.read_bytes())
    ours = GemmaTokenizer.from_pretrained(alone)
    (alone / "tokenizer.model").write_bytes(source.read_bytes())
    theirs = GemmaTokenizer.from_pretrained(alone)
    assert [ours.encode(t) for t in texts[::20]] == [theirs.encode(t) for t in texts[::20]]
    assert taken < 3  # a machine under load; 0.25 s alone


# -- what llama.cpp's converter makes of a vocabulary ----------------------------------------------

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
LISTED: Mapping[str, Callable[[str, bool], bool]] = {
    "nothing": lambda piece, is_added: False,
    "special pieces": lambda piece, is_added: piece in SPECIAL,
    "all added pieces": lambda piece, is_added: piece in SPECIAL or is_added,
}


def converted(source: Path, is_listed: Callable[[str, bool], bool]) -> dict[str, Any]:
    """The key-values that llama.cpp's converter writes.

    It asks sentencepiece for the types, which has none for user-defined pieces, and then follows
    tokenizer_config.json for the pieces which that lists.
    """
    model = encoder(source)
    added = {i for i, kind in enumerate(read_pieces(source.read_bytes()).types) if kind == 4}
    tokens, scores, types = [], [], []
    for i in range(model.get_piece_size()):
        piece, score = model.id_to_piece(i), model.get_score(i)
        kind = 2 if model.is_unknown(i) else 3 if model.is_control(i) else 1
        kind = 6 if model.is_byte(i) else kind
        if is_listed(piece, i in added):
            score, kind = -1000.0, 4
            if piece in (*SPECIAL, "<mask>", "<2mass>", "[@BOS@]") or piece.startswith("<unused"):
                kind = 3
            piece = piece.replace("\u2581", " ") if kind == 4 else piece
        tokens.append(piece.encode())
        scores.append(score)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    }


@pytest.mark.parametrize("ids", [{}, {"bos": 2, "eos": 1, "padding": 0, "unknown": 3}])
@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("source", [TINY, LARGE], ids=["tiny", "256k"])
def test_a_converted_vocabulary_encodes_as_the_original(
    source: Path, listed: str, ids: dict[str, int]
) -> None:
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    metadata = converted(source, LISTED[listed])
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    model = vocabulary_model(metadata)
    assert model
    back, original = encoder(model), encoder(source)
    texts = [*texts_to_encode(300), " " * 40, "a\n\n\nb\t\t\tc", "<b>x</b> [@BOS@] <unused7>"]
    assert back.encode(texts) == original.encode(texts)
    assert back.decode(back.encode(texts)) == original.decode(original.encode(texts))
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(back, name)() == getattr(original, name)()


def test_spaces_of_user_defined_pieces_are_plain(make_opened: Make, tmp_path: Path) -> None:
    """As llama.cpp looks for them in a text, and prints them; those of the others are not."""
    source = small_model(tmp_path)
    path = written(make_opened(), tmp_path / "out", tokenizer__model=source)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    original = encoder(source)
    i = original.piece_to_id("\u2581\u2581")
    assert tokens[i] == "  "
    rest = [k for k in range(20) if k != i]
    assert [tokens[k] for k in rest] == [original.id_to_piece(k) for k in rest]
    assert any("\u2581" in tokens[k] for k in rest)
    back = encoder(Gguf().open(path).files["tokenizer.model"])
    assert back.encode("ab   c    d") == original.encode("ab   c    d")
    assert i in back.encode("ab   c    d")


def test_damaged_models_are_told(tmp_path: Path) -> None:
    content = small_model(tmp_path).read_bytes()
    draw, outcomes = random.Random(0), set()
    for _ in range(3000):
        data = bytearray(content)
        for _ in range(draw.choice((1, 2))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            table = read_pieces(bytes(data[: draw.choice((None, draw.randrange(len(data))))]))
        except ValueError:
            outcomes.add("refused")
        else:
            assert len(table.texts) == len(table.scores) == len(table.types)
            outcomes.add("read")
    assert outcomes == {"read", "refused"}


def test_a_user_defined_piece_with_a_plain_space_is_refused(tmp_path: Path) -> None:
    content = small_model(tmp_path).read_bytes()
    assert content.count(b"<end_of_turn>") == 2  # the piece, and the trainer's list
    with pytest.raises(ValueError, match="has a plain space"):
        read_pieces(content.replace(b"<end_of_turn>", b"<end of turn>"))


# -- what else is of the vocabulary ----------------------------------------------------------------


def test_files_go_beside_it(make_opened: Make, tmp_path: Path) -> None:
    opened = dataclasses.replace(make_opened(), files={"tokenizer.model": small_model(tmp_path)})
    folder = tmp_path / "out"
    folder.mkdir()
    Gguf().write(folder, opened, WriteOptions())
    assert sorted(file.name for file in folder.iterdir()) == ["model.gguf", "tokenizer.model"]
    assert Gguf().open(folder).files == {"tokenizer.model": folder / "tokenizer.model"}


def test_a_file_asked_for_by_name_has_its_own_vocabulary(make_opened: Make, tmp_path: Path) -> None:
    """What is beside it may be another model's; it counts where the file has none."""
    source = small_model(tmp_path)
    path = written(make_opened(), tmp_path / "out", tokenizer__model=source)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).write_text("another model's")
    found = Gguf().open(path).files
    assert list(found) == ["tokenizer.model"]
    assert encoder(found["tokenizer.model"]).get_piece_size() == 20
    assert Gguf().open(path.parent).files["tokenizer.model"] == path.parent / "tokenizer.model"
    without = written(make_opened(), tmp_path / "without")
    (without.parent / "tokenizer.model").write_text("its own")
    assert Gguf().open(without).files == {"tokenizer.model": without.parent / "tokenizer.model"}


def test_a_vocabulary_that_is_none_is_refused(make_opened: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no vocabulary that a GGUF can hold"):
        Gguf().write(tmp_path, make_opened(), WriteOptions())


def test_a_vocabulary_that_is_too_large_is_refused(make_opened: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="4,096 pieces, and the config's vocab_size is 50"):
        written(make_opened(), tmp_path / "out", tokenizer__model=TINY)


def test_marks_and_padding(make_opened: Make, tmp_path: Path) -> None:
    source = small_model(tmp_path)
    path = written(make_opened(), tmp_path / "out", tokenizer__model=source)
    metadata = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 50
    assert tokens[20:22] == ["[PAD20]", "[PAD21]"]
    assert metadata["tokenizer.ggml.token_type"][49] == gguf.TokenType.UNUSED
    assert tokens[metadata["tokenizer.ggml.eot_token_id"]] == "<end_of_turn>"
    assert metadata["tokenizer.ggml.token_type"][tokens.index("<end_of_turn>")] == 4
    assert metadata["tokenizer.ggml.unknown_token_id"] == 3
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert "tokenizer.ggml.fim_pre_token_id" not in metadata
    model = Gguf().open(path).files["tokenizer.model"]
    assert encoder(model).get_piece_size() == 20


def test_a_chat_template_comes_back(make_opened: Make, tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }} é", "utf-8")
    path = written(make_opened(), tmp_path / "out", chat_template__jinja=template)
    found = Gguf().open(path).files
    assert found["chat_template.jinja"].read_text("utf-8") == "{{ messages }} é"
    stated = tmp_path / "tokenizer_config.json"
    stated.write_text('{"chat_template": "{{ other }}"}', "utf-8")
    path = written(make_opened(), tmp_path / "other", tokenizer_config__json=stated)
    assert gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents() == "{{ other }}"


def test_a_damaged_cache_is_made_again(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out", tokenizer__model=small_model(tmp_path))
    model = Gguf().open(path).files["tokenizer.model"]
    content = model.read_bytes()
    model.write_bytes(b"damaged")
    assert Gguf().open(path).files["tokenizer.model"].read_bytes() == content
    assert [file.name for file in model.parent.iterdir()] == [model.name]


def test_without_a_place_for_the_cache(
    make_opened: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(make_opened(), tmp_path / "out", tokenizer__model=small_model(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "file"))
    found = Gguf().open(path)
    assert found.files == {}
    assert "cannot be written to the cache" in found.notes[0]


def test_vocabularies_of_other_kinds() -> None:
    good: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [b"a", b"b"],
        "tokenizer.ggml.scores": np.zeros(2, np.float32),
        "tokenizer.ggml.token_type": np.ones(2, np.int32),
    }
    assert vocabulary_model(good)
    assert vocabulary_model({}) is None
    others: dict[str, list[Any]] = {
        "model": ["gpt2", np.zeros(2), np.zeros(0), [b"llama"], 7],
        "tokens": [[], [b"a"], "ab", np.zeros(2)],
        "scores": [np.zeros(1, np.float32), np.zeros(2), np.full(2, np.nan, np.float32), "0"],
        "token_type": [np.ones(3, np.int32), np.ones(2, np.float32), np.full(2, 9), [b"1"]],
    }
    for name, values in others.items():
        for value in values:
            assert vocabulary_model(good | {f"tokenizer.ggml.{name}": value}) is None, name
