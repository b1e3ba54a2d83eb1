"""The options that only this backend has, and what each of them does."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from gemma_hub import Gemma, GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub.options import read_switches
from gemma_hub.tasks.causal_lm import CausalLM
from gemma_hub_torch import GemmaForCausalLM
from gemma_hub_torch.backend import TorchModel
from gemma_hub_torch.fast_options import TorchOptions

CONFIG = GemmaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("options") / "model"
    GemmaForCausalLM(CONFIG).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> CausalLM:
    return Gemma.load(path, backend="torch", device="cpu", backend_options=options)


def program_count() -> int:
    return counters["stats"]["unique_graphs"]


# -- names and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nativ": True}, r"no option 'nativ'\. Did you mean 'native'\?"),
        ({"zzz": True}, r"no option 'zzz'\. Known: native, compile\."),
        ({"native": 1}, "native is 1; expected True or False"),
        ({"compile": "yes"}, "compile is 'yes'; expected True or False"),
    ],
)
def test_a_wrong_option_is_refused(path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(path, **options)


def test_false_is_as_if_it_were_not_given() -> None:
    assert read_switches(TorchOptions, "torch", {"compile": False}) == TorchOptions()


IMPORTED = """
import sys
from gemma_hub import Gemma
lm = Gemma.load(sys.argv[1], backend="torch", device="cpu")
lm.generate(input_ids=[[5, 6, 7]], max_new_tokens=3)
assert "torch" in sys.modules
assert "torch._dynamo" not in sys.modules
"""


def test_torch_s_compiler_is_not_imported_unless_it_is_asked_for(path: Path) -> None:
    # It takes more than a second, many times as long as loading a model.
    subprocess.run([sys.executable, "-c", IMPORTED, str(path)], check=True, timeout=120)


# -- compile --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(path: Path) -> CausalLM:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
    return load(path, compile=True)


@pytest.fixture(scope="module")
def plain(path: Path) -> CausalLM:
    return load(path)


def test_compiled_steps_give_the_plain_loop_s_tokens_with_one_program(
    plain: CausalLM, compiled: CausalLM
) -> None:
    rng, before = np.random.default_rng(7), program_count()
    # Prompts from one token up; as many slots as the model has heads, or their size, or more.
    for length, new in ((1, 7), (7, 17), (3, 20), (1, 2), (30, 10), *rng.integers(1, 40, (9, 2))):
        settings = {
            "input_ids": [rng.integers(3, CONFIG.vocab_size, length).tolist()],
            "max_new_tokens": int(new),
            "eos_token_id": int(rng.integers(CONFIG.vocab_size)),
        }
        expected, found = plain.generate(**settings), compiled.generate(**settings)
        assert found[0].token_ids == expected[0].token_ids
    assert program_count() - before == 1


def test_several_rows_with_padding_end_as_one_row(plain: CausalLM, compiled: CausalLM) -> None:
    rng = np.random.default_rng(8)
    rows = [rng.integers(3, CONFIG.vocab_size, length).tolist() for length in (4, 9, 1, 6)]
    before = program_count()
    for settings in ({"eos_token_id": 9}, {"num_beams": 3}, {"temperature": 1.0, "seed": 4}):
        expected = plain.generate(input_ids=rows, max_new_tokens=20, **settings)
        found = compiled.generate(input_ids=rows, max_new_tokens=20, **settings)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    model = compiled.contract
    cache = model.init_cache(1, 20)
    mask = [[False] * 5 + [True] * 3]
    inputs = ModelInputs.prepare(CONFIG, [[0] * 5 + [7, 8, 9]], mask)
    _, cache = model.extend(inputs, cache)  # a row that came to be alone in a padded batch
    inputs = ModelInputs.prepare(CONFIG, [[10]], next_position=cache.next_position)
    outputs, _ = model.extend(inputs, cache)
    whole = plain.forward([[7, 8, 9, 10]], logits_to_keep=1).logits
    torch.testing.assert_close(outputs.logits, whole, rtol=1e-4, atol=1e-4)
    assert program_count() - before <= 1  # none, where the test above came first


def test_a_cache_is_filled_to_its_end(plain: CausalLM, compiled: CausalLM) -> None:
    def steps(model: Any, capacity: int) -> Iterator[np.ndarray]:
        cache = model.init_cache(1, capacity)
        for length in (3, *[1] * (capacity - 3)):
            ids = (np.arange(length)[None] + cache.length) % 50 + 3
            inputs = ModelInputs.prepare(CONFIG, ids, next_position=cache.next_position)
            outputs, cache = model.extend(inputs, cache)
            yield model.to_numpy(outputs.logits)
        assert cache.length == capacity

    torch.compiler.reset()
    before = program_count()
    # The first cache has as many slots as a head has numbers; the only step of the next fills it.
    for capacity in (CONFIG.head_dim, 4, 12):
        expected, found = (list(steps(lm.contract, capacity)) for lm in (plain, compiled))
        np.testing.assert_allclose(
            np.concatenate(found, 1), np.concatenate(expected, 1), rtol=1e-4, atol=1e-4
        )
    assert program_count() - before == 1


def test_what_a_step_is_not_asked_for_often_comes_from_the_module(
    compiled: CausalLM, plain: CausalLM
) -> None:
    def states(model: Any) -> np.ndarray:
        cache = model.init_cache(1, 6)
        inputs = ModelInputs.prepare(CONFIG, [[5, 6, 7]])
        _, cache = model.extend(inputs, cache)
        inputs = ModelInputs.prepare(
            CONFIG, [[8]], next_position=cache.next_position, output_hidden_states=True
        )
        outputs, _ = model.extend(inputs, cache)
        assert len(outputs.hidden_states) == 3
        return model.to_numpy(outputs.hidden_states[-1])

    before = program_count()
    np.testing.assert_array_equal(states(compiled.contract), states(plain.contract))
    assert program_count() == before


def test_changed_weights_are_seen(path: Path, compiled: CausalLM) -> None:
    changed = load(path)
    settings = {"input_ids": [[5, 6, 7]], "max_new_tokens": 8, "eos_token_id": ()}
    first = compiled.generate(**settings)
    norms = [lm.model.model.norm.weight for lm in (changed, compiled)]
    with torch.no_grad():
        for norm in norms:
            norm.copy_(torch.linspace(-9, 9, 24))
    try:
        assert compiled.generate(**settings)[0].token_ids != first[0].token_ids
        assert compiled.generate(**settings) == changed.generate(**settings)
    finally:
        with torch.no_grad():
            norms[1].zero_()


def test_compile_on_another_device_is_refused() -> None:
    with torch.device("meta"):
        module = GemmaForCausalLM(CONFIG)
    with pytest.raises(InputError, match="compile was given and the model is on meta"):
        TorchModel(module, compiles=True)


def test_without_a_compiler_it_says_so_at_once(path: Path) -> None:
    torch.compiler.reset()  # what this process has compiled needs no compiler again
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(InputError, match=r"does not work here: .*It needs a C\+\+ compiler"),
    ):
        load(path, compile=True)
