"""Calls: pairs, padding, truncation, arrays, and code to fill in."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from gemma_hub.errors import InputError, TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

A, B = "a king had a son", "the old woman"


@pytest.fixture(scope="module", params=[GemmaTokenizer, GemmaTokenizerFast])
def kind(request):
    return request.param


@pytest.fixture
def tok(kind, model):
    return kind(model)


def words(tok, ids):
    return tok.convert_ids_to_tokens(ids)


# -- texts, pairs and lists ------------------------------------------------------------------------


def test_one_text_gives_lists_and_several_give_lists_of_lists(tok):
    one, several = tok(A), tok([A, B])
    assert one.input_ids == tok.encode(A) == several.input_ids[0]
    assert one["attention_mask"] == [1] * len(one.input_ids)
    assert several.input_ids[1] == tok.encode(B)
    assert tok([]) == {"input_ids": [], "attention_mask": []}


def test_a_pair_has_a_bos_before_each_text(tok):
    a, b = (tok.encode(text, add_special_tokens=False) for text in (A, B))
    bos, eos = tok.bos_token_id, tok.eos_token_id
    assert tok(A, B).input_ids == tok.encode(A, B) == [bos, *a, bos, *b]
    assert tok([A], [B]).input_ids == tok([(A, B)]).input_ids == [[bos, *a, bos, *b]]
    assert tok(A, B, add_special_tokens=False).input_ids == a + b
    tok.add_eos_token = True
    row = tok(A, B, return_token_type_ids=True, return_special_tokens_mask=True)
    assert row.input_ids == [bos, *a, eos, bos, *b, eos]
    assert row.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 2)
    assert row.special_tokens_mask == [1, *[0] * len(a), 1, 1, *[0] * len(b), 1]
    assert tok.build_inputs_with_special_tokens(a, b) == row.input_ids
    assert tok.create_token_type_ids_from_sequences(a, b) == row.token_type_ids
    assert tok.get_special_tokens_mask(a, b) == row.special_tokens_mask
    assert tok.get_special_tokens_mask(row.input_ids, already_has_special_tokens=True) == (
        row.special_tokens_mask
    )
    assert tok.num_special_tokens_to_add(pair=True) == 4
    tok.add_bos_token = False
    assert tok(A).input_ids == [*a, eos]
    assert tok.num_special_tokens_to_add() == 1


def test_spans_are_of_each_text_alone(tok):
    row = tok(A, B, return_offsets_mapping=True, return_token_type_ids=True)
    texts = [A, B]
    for token_id, (start, end), which in zip(
        row.input_ids, row.offset_mapping, row.token_type_ids, strict=True
    ):
        if token_id == tok.bos_token_id:
            assert (start, end) == (0, 0)
        else:
            assert tok.decode(token_id) == texts[which][start:end]


def test_both_classes_give_one_result_for_every_option(model):
    texts = [A, B, "", "  two▁<end_of_turn>é😀\n", "a"]
    returned = {f"return_{name}": True for name in (
        "token_type_ids", "special_tokens_mask", "offsets_mapping", "length")}  # fmt: skip
    tried = 0
    for around, side, cut in itertools.product(
        itertools.product([False, True], repeat=2), ["left", "right"], ["left", "right"]
    ):
        settings = dict(zip(("add_bos_token", "add_eos_token"), around, strict=True))
        settings |= {"padding_side": side, "truncation_side": cut}
        slow, fast = (k(model, **settings) for k in (GemmaTokenizer, GemmaTokenizerFast))
        for padding, truncation, seconds, plain in itertools.product(
            [False, "longest", "max_length"],
            [False, "longest_first", "only_first"],
            [None, texts[::-1]],
            [False, True],
        ):
            options = {"padding": padding, "truncation": truncation, "max_length": 40}
            options |= {"pad_to_multiple_of": 7, "allow_special": not plain, **returned}
            assert slow(texts, seconds, **options) == fast(texts, seconds, **options), options
            tried += 1
    assert tried == 16 * 36


def test_user_text_can_be_kept_plain_in_every_call(tok):
    text = "Hi<end_of_turn>"
    end = tok.token_to_id("<end_of_turn>")
    assert end in tok(text).input_ids
    for ids in (
        tok(text, allow_special=False).input_ids,
        tok([text], allow_special=False).input_ids[0],
        tok.encode(text, allow_special=False, max_length=99, truncation=True),
        tok.convert_tokens_to_ids(tok.tokenize(text, allow_special=False)),
    ):
        assert end not in ids
        assert tok.decode(ids, skip_special_tokens=True) == text


# -- padding and truncation ------------------------------------------------------------------------


def test_rows_are_padded_on_the_left_unless_told_otherwise(tok):
    short, long = tok.encode(B), tok.encode(A + " " + A)
    gap = len(long) - len(short)
    left = tok([B, A + " " + A], padding=True, return_special_tokens_mask=True)
    assert left.input_ids == [[0] * gap + short, long]
    assert left.attention_mask == [[0] * gap + [1] * len(short), [1] * len(long)]
    assert left.special_tokens_mask[0] == [1] * gap + [1] + [0] * (len(short) - 1)
    right = tok([B, A + " " + A], padding="longest", padding_side="right")
    assert right.input_ids[0] == short + [0] * gap
    tok.padding_side = "right"
    assert tok([B, A + " " + A], padding=True) == right
    assert tok(A, padding=True).input_ids == tok.encode(A)


def test_rows_are_padded_to_a_length_or_a_multiple(tok):
    assert len(tok(B, padding="max_length", max_length=50).input_ids) == 50
    assert len(tok(B, padding=True, pad_to_multiple_of=32).input_ids) == 32
    rows = tok([A, B], padding="max_length", max_length=50, pad_to_multiple_of=32)
    assert [len(row) for row in rows.input_ids] == [64, 64]
    long = tok(A, padding="max_length", max_length=3)
    assert long.input_ids == tok.encode(A)
    lengths = tok([A, B], padding=True, return_length=True).length
    assert lengths == [len(tok.encode(A)), len(tok.encode(B))]


def test_truncation_keeps_the_tokens_around(tok):
    tok.add_eos_token = True
    ids = tok.encode(A, add_special_tokens=False)
    cut = tok(A, truncation=True, max_length=6, return_offsets_mapping=True)
    assert cut.input_ids == [2, *ids[:4], 1]
    assert cut.offset_mapping[0] == cut.offset_mapping[-1] == (0, 0)
    tok.truncation_side = "left"
    cut = tok(A, truncation=True, max_length=6, return_offsets_mapping=True)
    assert cut.input_ids == [2, *ids[-4:], 1]
    assert cut.offset_mapping[-2][1] == len(A)
    assert tok(A, truncation=True, max_length=2).input_ids == [2, 1]
    with pytest.raises(InputError, match=r"max_length is 1, and the tokens around .* are 2"):
        tok(A, truncation=True, max_length=1)
    tok.model_max_length = 5
    assert len(tok(A, truncation=True).input_ids) == 5


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [((5, 5), 5, (3, 2)), ((9, 3), 6, (3, 3)), ((9, 3), 8, (5, 3)), ((3, 9), 7, (3, 4)),
     ((3, 9), 5, (3, 2)), ((1, 9), 4, (1, 3)), ((9, 1), 4, (3, 1)), ((4, 4), 8, (4, 4))],
)  # fmt: skip
def test_the_longer_text_of_a_pair_is_cut_first_and_of_equal_ones_the_second(
    tok, lengths, room, kept
):
    a, b = ("1" * n for n in lengths)
    row = tok(a, b, truncation=True, max_length=room, add_special_tokens=False,
              return_token_type_ids=True)  # fmt: skip
    assert (row.token_type_ids.count(0), row.token_type_ids.count(1)) == kept


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_longest_text_is_cut_one_token_at_a_time(tok, side):
    tok.truncation_side = side
    letters = tok.encode("1234567", add_special_tokens=False)
    for m, n, room in itertools.product(range(8), range(8), range(1, 14)):
        a, b = letters[:m], letters[:n]
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop(0 if side == "left" else -1)
        row = tok("1234567"[:m], "1234567"[:n], truncation=True, max_length=room + 2)
        assert row.input_ids == [2, *a, 2, *b]


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_text_of_a_pair_is_cut_at_the_side_that_is_set(tok, side):
    tok.truncation_side = side
    a, b = (tok(t, add_special_tokens=False, return_offsets_mapping=True) for t in (A, B))
    kept = slice(3, None) if side == "left" else slice(len(a.input_ids) - 3)
    row = tok(A, B, truncation="only_first", max_length=len(a.input_ids) + len(b.input_ids) - 1,
              return_offsets_mapping=True)  # fmt: skip
    assert row.input_ids == [2, *a.input_ids[kept], 2, *b.input_ids]
    assert row.offset_mapping == [(0, 0), *a.offset_mapping[kept], (0, 0), *b.offset_mapping]


def test_a_text_may_be_cut_to_nothing(tok):
    b = tok.encode(B, add_special_tokens=False)
    assert tok(A, B, truncation="only_first", max_length=len(b) + 2).input_ids == [2, 2, *b]
    assert tok(A, truncation=True, max_length=1).input_ids == [2]
    assert tok(A, "").input_ids == [*tok.encode(A), 2]


def test_one_text_of_a_pair_is_cut_if_that_is_enough(tok):
    full = tok(A, B).input_ids
    only = tok(A, B, truncation="only_second", max_length=len(full) - 2).input_ids
    assert only == full[:-2]
    with pytest.raises(InputError, match="cannot make the texts short enough"):
        tok(A, B, truncation="only_second", max_length=5)
    with pytest.raises(InputError, match="needs a second text"):
        tok(A, truncation="only_second", max_length=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "max_length"}, "need a length"),
        ({"truncation": True}, "need a length"),
        ({"padding": "long"}, "padding is 'long'; expected True, False, 'longest'"),
        ({"truncation": "first"}, "truncation is 'first'"),
        ({"padding": True, "padding_side": "up"}, "padding_side is 'up'; expected 'left'"),
        ({"truncation": True, "max_length": 0}, "max_length is 0; expected an integer from 1"),
        ({"padding": True, "pad_to_multiple_of": -8}, "pad_to_multiple_of is -8"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'; expected 'np', 'pt', 'jax'"),
        ({"return_tensors": []}, r"return_tensors is \[\]; expected"),
        ({"truncation": True, "max_length": True}, "max_length is True"),
        ({"return_tensors": "np"}, r"The rows have \d+ to \d+ tokens.*padding=True"),
    ],
)
def test_wrong_options_are_named(tok, options, message):
    with pytest.raises(InputError, match=message):
        tok([A, B], **options)


@pytest.mark.parametrize(
    ("text", "pair", "error"),
    [
        (None, None, TokenizerError), (b"a", None, TokenizerError),
        (["a", 3], None, TokenizerError),
        ("a", ["b"], InputError), (["a"], "b", InputError), (["a", "b"], ["c"], InputError),
        (["a"], 5, InputError), (["a"], b"b", InputError), (["a"], (t for t in "a"), InputError),
        ([("a", "b"), "c"], None, TokenizerError), ([("a", "b"), ("c",)], None, TokenizerError),
        ([["a", "b", "c"]], None, TokenizerError),
    ],
)  # fmt: skip
def test_wrong_texts_are_named(tok, text, pair, error):
    with pytest.raises(error, match="expected"):
        tok(text, pair)


def test_pad_collates_what_calls_gave(tok):
    rows = [tok(A, return_token_type_ids=True), tok(B, return_token_type_ids=True)]
    expected = tok([A, B], padding=True, return_token_type_ids=True)
    assert tok.pad(rows) == expected
    assert tok.pad(tok([A, B], return_token_type_ids=True)) == expected
    assert tok.pad([{"input_ids": np.array(tok.encode(t))} for t in (A, B)]) == tok(
        [A, B], padding=True
    )
    assert tok.pad(rows, return_tensors="np").input_ids.shape == (2, len(rows[0].input_ids))
    with pytest.raises(InputError, match="labels has rows of"):
        tok.pad([{"input_ids": [2, 5], "labels": [1]}])
    with pytest.raises(InputError, match="expected input_ids"):
        tok.pad([{"ids": [2, 5]}])


def test_pad_takes_rows_that_are_padded_already(tok):
    rows = tok([A, B], padding=True, return_special_tokens_mask=True)
    wider = tok.pad(rows, padding="max_length", max_length=30)
    assert wider == tok([A, B], padding="max_length", max_length=30,
                        return_special_tokens_mask=True)  # fmt: skip
    right = tok.pad({"input_ids": [[2, 5], [2]]}, padding_side="right", pad_to_multiple_of=4)
    assert right == {"input_ids": [[2, 5, 0, 0], [2, 0, 0, 0]],
                     "attention_mask": [[1, 1, 0, 0], [1, 0, 0, 0]]}  # fmt: skip
    assert set(tok.pad({"input_ids": [[2]]}, return_attention_mask=False)) == {"input_ids"}
    assert tok.pad([]) == {"input_ids": [], "attention_mask": []}


def test_labels_at_padding_do_not_count(tok):
    rows = [{"input_ids": [2, 5], "labels": [7, 8]}, {"input_ids": [2], "labels": [9]}]
    batch = tok.pad(rows, return_tensors="np")
    assert batch.labels.tolist() == [[7, 8], [-100, 9]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [2]}, {"input_ids": [5], "attention_mask": [0]}], "the same entries"),
        ([{"input_ids": [2], "attention_mask": [0]}, {"input_ids": [5]}], "the same entries"),
        ([[2, 5], [2]], "have list; expected dicts"),
        ({"input_ids": [2, 5]}, r"input_ids has 2 for a row.*pad\(\[encoding\]\)"),
        ({"input_ids": [[2], [5]], "length": [1, 1]}, "no rule to pad length"),
        ({"input_ids": [[2]], "name": ["a"]}, "no rule to pad name"),
    ],
)
def test_encodings_that_cannot_be_padded_are_named(tok, rows, message):
    with pytest.raises(InputError, match=message):
        tok.pad(rows)


# -- arrays of frameworks --------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["np", "pt", "jax"])
def test_arrays_have_a_row_for_each_text(tok, framework):
    module = {"np": "numpy", "pt": "torch", "jax": "jax"}[framework]
    pytest.importorskip(module, reason="the core's tests pass without it")
    encoding = tok([A, B], padding=True, return_tensors=framework, return_offsets_mapping=True)
    assert type(encoding.input_ids).__module__.partition(".")[0] in {module, "jaxlib"}
    assert ("int32" if framework == "jax" else "int64") in str(encoding.input_ids.dtype)
    assert tuple(encoding.offset_mapping.shape) == (*tuple(encoding.input_ids.shape), 2)
    assert np.asarray(encoding.input_ids).tolist() == tok([A, B], padding=True).input_ids
    assert tuple(tok(A, return_tensors=framework).input_ids.shape) == (1, len(tok.encode(A)))
    assert tok.batch_decode(encoding.input_ids, skip_special_tokens=True) == [A, B]
    assert tok.decode(encoding.input_ids[0], skip_special_tokens=True) == A
    assert tok.decode(encoding.input_ids[0, -1]) == tok.decode(tok.encode(A)[-1])
    collated = tok.pad([{"input_ids": row} for row in encoding.input_ids], return_tensors=framework)
    assert np.asarray(collated.input_ids).tolist() == np.asarray(encoding.input_ids).tolist()
    if framework == "pt":
        assert encoding.to("cpu").input_ids.device.type == "cpu"


def test_arrays_of_no_row_and_of_no_token_have_their_axes(tok):
    options = {"return_tensors": "np", "return_offsets_mapping": True, "return_length": True}
    shapes = {name: array.shape for name, array in tok([], **options).items()}
    assert shapes == {"input_ids": (0, 0), "attention_mask": (0, 0), "offset_mapping": (0, 0, 2),
                      "length": (0,)}  # fmt: skip
    assert tok("", add_special_tokens=False, **options).offset_mapping.shape == (1, 0, 2)


@pytest.mark.parametrize(("framework", "module"), [("pt", "torch"), ("jax", "jax")])
def test_a_framework_that_is_not_installed_is_named(tok, framework, module, monkeypatch):
    for name in (module, f"{module}.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"needs {module}, which cannot be imported"):
        tok(A, return_tensors=framework)


def test_numpy_lengths_are_lengths(tok):
    assert tok(A, truncation=True, max_length=np.int64(3)) == tok(A, truncation=True, max_length=3)


def test_no_framework_is_imported_before_it_is_asked_for(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model)
    code = (
        "import sys\nfrom gemma_hub import GemmaTokenizer, GemmaTokenizerFast\n"
        f"for kind in (GemmaTokenizer, GemmaTokenizerFast):\n"
        f"    tok = kind.from_pretrained({str(tmp_path)!r})\n"
        "    tok(['a', 'b'], padding=True, return_tensors='np')\n"
        "    tok.apply_chat_template([{'role': 'user', 'content': 'a'}])\n"
        "assert not {'torch', 'jax', 'flax', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- ids and pieces --------------------------------------------------------------------------------


def test_pieces_and_ids_convert_both_ways(tok):
    pieces = tok.tokenize(A)
    assert tok.convert_tokens_to_ids(pieces) == tok.encode(A, add_special_tokens=False)
    assert tok.convert_tokens_to_string(pieces) == A
    assert tok.tokenize(A, add_special_tokens=True) == ["<bos>", *pieces]
    assert tok.convert_tokens_to_ids("no such") == tok.unk_token_id
    assert tok.convert_ids_to_tokens(2) == "<bos>"
    assert tok.convert_ids_to_tokens([2, 5, 1], skip_special_tokens=True) == []
    assert tok.convert_tokens_to_string(["<0xE2>", "<0x82>", "<0xAC>", "▁a"]) == "€ a"
    assert len(tok) == tok.vocab_size == len(tok.get_vocab()) == 420
    assert tok.vocab["<eos>"] == 1
    assert tok.decode(5) == tok.decode([5]) == "<2mass>"
    for wrong in ("ab", 1.5, None, [[1]], np.array([[2, 5]]), np.array([2.0]), tok(A)):
        with pytest.raises(TokenizerError, match="expected"):
            tok.decode(wrong)
    for one in (5, np.int64(5), np.array(5), np.array([5])):
        assert tok.decode(one) == "<2mass>"
    assert tok.batch_decode([[2, 5], np.array([1]), (5,), []]) == [
        "<bos><2mass>", "<eos>", "<2mass>", "",
    ]  # fmt: skip


# -- code ------------------------------------------------------------------------------------------

FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"]


def test_code_is_filled_in_between_plain_texts(kind, train):
    tok = kind(train(user_defined_symbols=[*FIM, "\n"]))
    prefix, middle, suffix, separator = (tok.token_to_id(name) for name in FIM)
    ids = tok.fim_prompt("def f(x):\n", "<|fim_middle|>return x<eos>")
    assert (ids[0], ids[1], ids[-1]) == (tok.bos_token_id, prefix, middle)
    assert tok.special_token_ids & set(ids[2:-1]) == {suffix}
    cut = ids.index(suffix)
    assert tok.decode(ids[2:cut]) == "def f(x):\n"
    assert tok.decode(ids[cut + 1 : -1]) == "<|fim_middle|>return x<eos>"
    assert tok.fim_stop_token_ids == (1, prefix, middle, suffix, separator)
    with pytest.raises(InputError, match="suffix is a NoneType; expected a str"):
        tok.fim_prompt("a", None)


def test_other_vocabularies_fill_no_code_in(tok):
    with pytest.raises(TokenizerError, match=r"no <\|fim_prefix\|> and no .*only CodeGemma's"):
        tok.fim_prompt("a", "b")
