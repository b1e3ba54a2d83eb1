"""CausalLM: prompts of every kind, texts, stop ids, streams and errors."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_hub.errors import CapacityError, InputError, TokenizerError, UnsupportedFeature
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.prefix import ChatMemory
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.outputs import ModelOutputs
from gemma_hub.plugins.registry import LoadedBackend
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub.tasks.causal_lm import CausalLM

TEXT = "the king"
SAMPLED = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 200, "seed": 3}


class ScriptedModel:
    """Says the same tokens whatever it is asked."""

    native, device = "a script", "fake:0"

    def __init__(self, vocab_size, prompt_length, script):
        self.vocab_size, self.prompt_length, self.script = vocab_size, prompt_length, script

    def forward(self, inputs):
        logits = np.zeros((*inputs.shape, self.vocab_size), np.float32)
        logits[..., self.script[inputs.shape[1] - self.prompt_length]] = 1.0
        return ModelOutputs(logits)

    def to_numpy(self, array):
        return array


def make(model, tokenizer, config=None, features=(), **options):
    spec = BackendSpec(
        name="fake", api_version="1.0", factory="fake:Fake", features=frozenset(features)
    )
    backend = LoadedBackend(
        name="fake", spec=spec, distribution="fake-dist", version="1.2", backend=None
    )
    config = model.config if config is None else config
    return CausalLM(model, config, backend=backend, dtype="float32", tokenizer=tokenizer, **options)


@pytest.fixture
def lm(text_model, tokenizer):
    return make(text_model, tokenizer, features={"cache", "export"})


@pytest.fixture
def scripted(text_model, tokenizer):
    """A CausalLM that answers `TEXT` with the given pieces, bytes and ids."""

    def build(*script, tokenizer=tokenizer, **options):
        ids = []
        for part in script:
            if isinstance(part, bytes):
                ids += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in part]
            elif isinstance(part, str):
                ids += tokenizer.encode(part, add_special_tokens=False)
            else:
                ids.append(part)
        length = len(tokenizer.encode(TEXT))
        model = ScriptedModel(tokenizer.vocab_size, length, ids)
        config = dataclasses.replace(text_model.config, vocab_size=tokenizer.vocab_size)
        return make(model, tokenizer, config, **options), len(ids)

    return build


# -- prompts ---------------------------------------------------------------------------------------


def test_one_text_gives_one_generation(lm, tokenizer):
    made = lm.generate(TEXT, **SAMPLED)
    assert made.prompt_token_ids == tuple(tokenizer.encode(TEXT))
    assert made.prompt_token_ids[0] == tokenizer.bos_token_id
    settings = GenerationSettings(eos_token_id=lm.eos_token_ids, **SAMPLED)
    (expected,) = generate_ids(lm.contract, lm.config, [made.prompt_token_ids], settings)
    assert (made.token_ids, made.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert made.text == tokenizer.decode(made.token_ids, skip_special_tokens=True)
    assert made.text
    assert made.logprobs is None


def test_several_texts_give_a_list(lm):
    several = lm.generate([TEXT, "a small dog", ""], **SAMPLED)
    assert [type(several), len(several)] == [list, 3]
    assert several[0] == lm.generate(TEXT, **SAMPLED)
    assert lm.generate([TEXT], **SAMPLED) == several[:1]
    assert lm.generate([]) == []


def test_ids_are_fed_as_they_are(lm):
    rows = [[5, 9, 9], [7], [2, 2, 5, 9]]
    made = lm.generate(input_ids=rows, **SAMPLED)
    assert [list(m.prompt_token_ids) for m in made] == rows
    same = lm.generate(input_ids=[np.array(row) for row in rows], **SAMPLED)
    assert same == made
    assert lm.generate(input_ids=np.array([[5, 9, 9]]), **SAMPLED) == made[:1]


def test_masked_tokens_are_left_out_on_either_side(lm):
    plain = lm.generate(input_ids=[[5, 9], [7, 8, 9]], **SAMPLED)
    left = lm.generate(
        input_ids=[[0, 5, 9], [7, 8, 9]], attention_mask=[[0, 1, 1], [1, 1, 1]], **SAMPLED
    )
    right = lm.generate(
        input_ids=np.array([[5, 9, 1], [7, 8, 9]]),
        attention_mask=np.array([[True, True, False], [True] * 3]),
        **SAMPLED,
    )
    assert plain == left == right


def test_a_drawn_seed_is_recorded_and_repeats_the_text(lm):
    drawn = lm.generate(TEXT, max_new_tokens=12, temperature=1.5)
    assert isinstance(drawn.seed, int)
    assert lm.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=drawn.seed) == drawn
    assert lm.generate(TEXT, max_new_tokens=2, seed=3).seed is None  # greedy: no bits were used


def test_logprobs_are_there_on_request(lm):
    made = lm.generate(TEXT, logprobs=True, **SAMPLED)
    assert len(made.logprobs) == len(made.token_ids)
    assert max(made.logprobs) < 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither of a prompt and input_ids"),
        ({"prompt": "a", "input_ids": [[1]]}, "both of a prompt and input_ids"),
        ({"prompt": "a", "attention_mask": [[1]]}, "attention_mask goes with input_ids"),
        ({"prompt": ["a", 5]}, "Prompt 1 is int; expected a text"),
        ({"prompt": [[2, 5]]}, r"Prompt 0 is list.*input_ids=\[\["),
        ({"prompt": 5}, "The prompt is int; expected a text"),
        (
            {"input_ids": [2, 5]},
            r"input_ids\[0\] is int64 of shape \(\).*=\[\[2, 5, 9\]",
        ),
        ({"input_ids": [[2.5]]}, r"input_ids\[0\] is float64"),
        ({"input_ids": [[True]]}, r"input_ids\[0\] is bool"),
        ({"input_ids": [["a"]]}, r"input_ids\[0\] is <U1"),
        ({"input_ids": [[[2]]]}, r"input_ids\[0\] is int64 of shape \(1, 1\)"),
        ({"input_ids": [[[2], [3, 4]]]}, r"input_ids\[0\] cannot become an array"),
        ({"input_ids": 5}, "input_ids is int; expected rows"),
        ({"input_ids": "abc"}, "input_ids is str; expected rows"),
        ({"input_ids": [[]]}, "Prompt 0 has no tokens"),
        ({"input_ids": [[5], [999]]}, "Prompt 1 has the id 999 at place 0"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"rows of \[1\] tokens.*\[2\]"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]]}, "other than 0 and 1"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0.5, 1]]}, r"attention_mask\[0\] is float64"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "Prompt 0 has no tokens"),
        ({"prompt": "a", "temperatur": 1.0}, "Did you mean 'temperature'"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_work(lm, arguments, words):
    with pytest.raises(InputError, match=words):
        lm.generate(**arguments)
    assert lm.contract.calls == []


def test_a_prompt_past_the_models_limit_is_an_error(lm):
    with pytest.raises(CapacityError, match="max_position_embeddings"):
        lm.generate(TEXT, max_new_tokens=64)
    with pytest.raises(CapacityError, match="max_position_embeddings"):
        lm.stream(TEXT, max_new_tokens=64)


def test_without_a_tokenizer_ids_work_and_texts_are_an_error(text_model, lm):
    bare = make(text_model, None)
    expected = lm.generate(input_ids=[[2, 5]], eos_token_id=(), **SAMPLED)
    made = bare.generate(input_ids=[[2, 5]], **SAMPLED)
    assert made == [dataclasses.replace(expected[0], text="")]
    for call in (bare.generate, bare.stream):
        with pytest.raises(TokenizerError, match=r"no tokenizer.*input_ids=\[\["):
            call(TEXT)


# -- stops -----------------------------------------------------------------------------------------


def test_stop_ids_are_the_checkpoints_and_end_of_turn(text_model, tokenizer, plain_tokenizer):
    turn = tokenizer.token_to_id("<end_of_turn>")
    assert make(text_model, tokenizer, eos_token_ids=(1, 9)).eos_token_ids == (1, 9, turn)
    assert make(text_model, tokenizer, eos_token_ids=(1, turn)).eos_token_ids == (1, turn)
    assert make(text_model, plain_tokenizer, eos_token_ids=(1,)).eos_token_ids == (1,)
    ordinary = SimpleNamespace(token_to_id=lambda piece: 9, special_token_ids=frozenset())
    assert make(text_model, ordinary, eos_token_ids=(1,)).eos_token_ids == (1,)
    config = dataclasses.replace(text_model.config, eos_token_id=(1, 8))
    assert make(text_model, None, config).eos_token_ids == (1, 8)


def test_end_of_turn_stops_and_is_not_in_the_text(scripted, tokenizer):
    turn = tokenizer.token_to_id("<end_of_turn>")
    lm, _ = scripted(" and", turn, " the queen")
    made = lm.generate(TEXT, max_new_tokens=5)
    assert (made.text, made.token_ids[-1], made.finish_reason) == (" and", turn, "stop")


def test_the_callers_stop_ids_replace_the_checkpoints(scripted, tokenizer):
    turn = tokenizer.token_to_id("<end_of_turn>")
    mark = tokenizer.token_to_id("<0x21>")
    lm, count = scripted(" and", turn, b"!", " dog")
    made = lm.generate(TEXT, max_new_tokens=count, eos_token_id=mark)
    assert made.token_ids[-2:] == (turn, mark)
    assert made.text == " and!"
    unstopped = lm.generate(TEXT, max_new_tokens=count, eos_token_id=[])
    assert (len(unstopped.token_ids), unstopped.finish_reason) == (count, "length")


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_joins_to_the_text_of_generate(lm):
    for seed in range(20):
        settings = SAMPLED | {"seed": seed}
        made = lm.generate(TEXT, **settings)
        *pieces, last = lm.stream(TEXT, **settings)
        assert tuple(piece.token_id for piece in pieces) == made.token_ids
        assert "".join(piece.text for piece in pieces) + last.text == made.text
        assert (last.token_id, last.finish_reason) == (None, made.finish_reason)
        assert {piece.finish_reason for piece in pieces} == {None}


def test_a_character_of_several_tokens_comes_whole(scripted, tokenizer):
    turn = tokenizer.token_to_id("<end_of_turn>")
    lm, count = scripted("a", "é".encode(), "🙂".encode(), turn)
    texts = [piece.text for piece in lm.stream(TEXT, max_new_tokens=count)]
    assert texts == ["a", "", "é", "", "", "", "🙂", "", ""]


def test_what_is_cut_off_comes_with_the_last_piece(scripted):
    lm, count = scripted("a", "🙂".encode()[:3])
    *_, last = lm.stream(TEXT, max_new_tokens=count)
    assert (last.text, last.token_id, last.finish_reason) == ("\ufffd" * 3, None, "length")
    assert lm.generate(TEXT, max_new_tokens=count).text == "a" + "\ufffd" * 3


def test_a_stream_is_lazy_and_may_be_closed(lm):
    expected = lm.generate(TEXT, **SAMPLED)
    lm.contract.calls.clear()
    pieces = lm.stream(TEXT, **SAMPLED)
    assert lm.contract.calls == []
    next(pieces)
    pieces.close()
    assert len(lm.contract.calls) == 1
    assert list(pieces) == []
    assert lm.generate(TEXT, **SAMPLED) == expected
    assert next(lm.stream(TEXT, **SAMPLED)).token_id == expected.token_ids[0]


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([TEXT], {}, "stream continues one text; got list"),
        (None, {}, "stream continues one text; got NoneType"),
        (TEXT, {"beams": 3}, "no generation setting 'beams'"),
        (TEXT, {"top_k": 0}, "top_k is 0"),
    ],
)
def test_a_streams_errors_come_in_the_call(lm, prompt, settings, words):
    with pytest.raises(InputError, match=words):
        lm.stream(prompt, **settings)


# -- stop texts and rules --------------------------------------------------------------------------


def test_a_stop_text_ends_the_row_and_is_not_in_the_text(scripted):
    lm, count = scripted(" and", " the queen")
    free = lm.generate(TEXT, max_new_tokens=count)
    assert free.text == " and the queen"
    made = lm.generate(TEXT, max_new_tokens=count, stop=["d t", "x"])
    assert (made.text, made.finish_reason) == (" an", "stop")
    assert made.token_ids == free.token_ids[: len(made.token_ids)]
    assert len(made.token_ids) < count


def test_a_stream_stops_where_generate_does(scripted):
    lm, count = scripted(" and", " the queen")
    for stop in ("d t", "queen", "qu", "none of it"):
        pieces = list(lm.stream(TEXT, max_new_tokens=count, stop=stop))
        made = lm.generate(TEXT, max_new_tokens=count, stop=stop)
        assert "".join(piece.text for piece in pieces) == made.text
        assert pieces[-1].finish_reason == made.finish_reason


def test_each_row_stops_by_itself(lm):
    prompts = [TEXT, "a small dog", "the queen"]
    free = lm.generate(prompts, **SAMPLED)
    stop = free[0].text[2:4]
    stopped = lm.generate(prompts, stop=stop, **SAMPLED)
    assert [each.text for each in stopped] == [each.text.partition(stop)[0] for each in free]
    assert stopped[0].finish_reason == "stop"


def test_bad_words_may_be_texts(lm):
    free = lm.generate(TEXT, **SAMPLED)
    word = lm.tokenizer.decode([free.token_ids[2]])
    forbidden = lm.generate(TEXT, bad_words=[word], **SAMPLED)
    assert forbidden.token_ids[:2] == free.token_ids[:2]
    assert forbidden.token_ids[2] != free.token_ids[2]


def test_continuations_of_a_prompt_are_together(lm):
    alone = lm.generate(TEXT, num_return_sequences=2, **SAMPLED)
    both = lm.generate([TEXT, "the queen"], num_return_sequences=2, **SAMPLED)
    assert both[:2] == alone
    assert len({each.text for each in both}) == 4
    assert [each.prompt_token_ids == alone[0].prompt_token_ids for each in both] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_stream_and_a_chat_have_one_text(lm):
    several = {"num_return_sequences": 2, "temperature": 1.0}
    with pytest.raises(InputError, match="num_return_sequences is 2; a stream has one text"):
        lm.stream(TEXT, **several)
    with pytest.raises(InputError, match="num_return_sequences is no setting of a chat"):
        lm.chat([{"role": "user", "content": TEXT}], **several)


# -- conversations ---------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "the <end_of_turn>"}]


def test_chat_answers_a_conversation_whose_users_forge_nothing(lm, tokenizer):
    made = lm.chat(HELLO, **SAMPLED)
    turn = tokenizer.token_to_id("<end_of_turn>")
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert made.prompt_token_ids == tuple(expected)
    assert expected.count(turn) == expected.count(tokenizer.bos_token_id) == 1
    assert made == lm.generate(input_ids=[expected], **SAMPLED)[0]
    *pieces, last = lm.stream_chat(HELLO, **SAMPLED)
    assert "".join(piece.text for piece in pieces) + last.text == made.text
    assert last.finish_reason == made.finish_reason


def test_the_end_of_the_turn_ends_an_answer(lm, tokenizer):
    turn = tokenizer.token_to_id("<end_of_turn>")
    assert turn in lm.eos_token_ids
    ends = [lm.chat(HELLO, max_new_tokens=8, temperature=3.0, seed=seed) for seed in range(40)]
    stopped = [made for made in ends if made.token_ids[-1] in lm.eos_token_ids]
    assert all(made.finish_reason == "stop" for made in stopped)
    assert all("<end_of_turn>" not in made.text for made in ends)


def test_a_memory_saves_reading_and_changes_no_answer(rows_model, tokenizer):
    config = dataclasses.replace(
        rows_model.config, vocab_size=tokenizer.vocab_size, max_position_embeddings=512
    )
    model = type(rows_model)(config)
    lm = CausalLM(model, config, backend=None, dtype="float32", tokenizer=tokenizer)
    memory, messages = ChatMemory(), []
    for question in ("the king", "and the queen", "the king and the queen"):
        messages.append({"role": "user", "content": question})
        plain = lm.chat(messages, max_new_tokens=3)
        model.calls.clear()
        assert lm.chat(messages, memory=memory, max_new_tokens=3) == plain
        read = sum(int(call.attention_mask.sum()) for call in model.calls)
        pieces = lm.stream_chat(messages, memory=memory, max_new_tokens=3)
        assert "".join(piece.text for piece in pieces) == plain.text
        messages.append({"role": "assistant", "content": plain.text})
    assert memory.prefix.token_ids == plain.prompt_token_ids
    assert read < len(plain.prompt_token_ids), "the earlier turns are not read again"


def test_chat_refuses_or_merges_a_system_message(lm, tokenizer):
    messages = [{"role": "system", "content": "a king"}, *HELLO]
    for call in (lm.chat, lm.stream_chat):
        with pytest.raises(InputError, match="system='merge'"):
            call(messages, max_new_tokens=1)
    made = lm.chat(messages, system="merge", max_new_tokens=1)
    assert "a king\n\nthe <end_of_turn>" in tokenizer.decode(made.prompt_token_ids)


def test_chat_needs_a_tokenizer_that_makes_prompts(text_model):
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        make(text_model, None).chat(HELLO)
    other = SimpleNamespace(special_token_ids=frozenset(), token_to_id=lambda piece: None)
    with pytest.raises(TokenizerError, match="has no apply_chat_template, which chat needs"):
        make(text_model, other).chat(HELLO)


# -- the model itself ------------------------------------------------------------------------------


def test_forward_checks_and_returns_the_backends_arrays(lm):
    out = lm.forward([[2, 5, 9], [0, 2, 7]], attention_mask=[[1, 1, 1], [0, 1, 1]])
    assert out.logits.shape == (2, 3, lm.config.vocab_size)
    (call,) = lm.contract.calls
    assert call.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    kept = lm.forward([[2, 5, 9]], position_ids=[[3, 4, 5]], logits_to_keep=1).to_numpy()
    assert kept.logits.shape == (1, 1, lm.config.vocab_size)
    assert lm.contract.calls[-1].position_ids.tolist() == [[3, 4, 5]]
    lm.forward([[2]], output_hidden_states=True)
    assert lm.contract.calls[-1].output_hidden_states
    with pytest.raises(InputError, match=r"input_ids\[0, 1\] is 999"):
        lm.forward([[2, 999]])


def test_embeddings_need_a_backend_that_takes_them(lm, text_model, tokenizer):
    embeds = np.zeros((1, 2, lm.config.hidden_size), np.float32)
    with pytest.raises(UnsupportedFeature, match="'fake' does not support 'inputs_embeds'"):
        lm.forward(inputs_embeds=embeds)
    seen = []
    text_model.forward = lambda inputs: seen.append(inputs)
    make(text_model, tokenizer, features={"inputs_embeds"}).forward(inputs_embeds=embeds)
    assert seen[0].inputs_embeds.shape == embeds.shape


def test_it_says_what_it_is(lm):
    assert lm.model is lm.contract.native
    assert lm.device == "fake:0"
    assert repr(lm) == (
        f"CausalLM(backend='fake', dtype='float32', device='fake:0', "
        f"parameters={lm.config.num_parameters:_})"
    )


def test_saving_needs_a_backend_that_exports(scripted, tmp_path):
    lm, _ = scripted("a")
    with pytest.raises(UnsupportedFeature, match="'fake' does not support 'export'"):
        lm.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
