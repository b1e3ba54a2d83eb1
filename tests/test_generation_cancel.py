"""What ends early leaves the model usable and its memory free."""

import dataclasses
import functools
import itertools
import weakref

import numpy as np
import pytest

from gemma_hub import memory
from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError
from gemma_hub.generation.loop import generate_ids, stream_ids
from gemma_hub.generation.many import generate_many_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.plugins.registry import plugin_registry

PROMPTS = [[2, 5, 9, 11], [2], [2, 7, 7, 7, 30]]
SETTINGS = GenerationSettings(max_new_tokens=9, temperature=1.0, seed=7, eos_token_id=[3, 4, 5])
CONFIG = GemmaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    eos_token_id=None,
)
FRAMEWORKS = ["numpy", "torch", "flax"]


class Watched:
    """Records the memory of every cache that a model makes, and can fail in a call.

    Attributes:
        fails_at: the call of `extend` that raises `error`; None for never.
    """

    def __init__(self, model, monkeypatch):
        self.made, self.calls, self.fails_at, self.error = [], 0, None, None
        for name in ("init_cache", "gather_rows"):
            if hasattr(model, name):
                monkeypatch.setattr(model, name, self._noting(getattr(model, name)))
        extend = model.extend

        def failing(*args):
            self.calls += 1
            outputs, cache = extend(*args)
            self._note(cache)
            if self.calls == self.fails_at:
                raise self.error
            return outputs, cache

        monkeypatch.setattr(model, "extend", failing)

    def _noting(self, method):
        def noted(*args):
            cache = method(*args)
            self._note(cache)
            return cache

        return noted

    def _note(self, cache):
        arrays = cache.arrays
        layers = getattr(arrays, "layers", arrays)
        for array in [layers] if isinstance(layers, np.ndarray) else itertools.chain(*layers):
            self.made.append(weakref.ref(array))

    def alive(self):
        """Arrays that are not free, though no garbage collection ran."""
        return sum(ref() is not None for ref in self.made)


def ids(model, prompts=PROMPTS, settings=SETTINGS):
    return generate_ids(model, model.config, prompts, settings)


@functools.cache
def built(backend):
    """A small model with large random weights, so that it says something."""
    draw = np.random.default_rng(3).normal
    arrays = {
        name: draw(size=shape, scale=0.3 if "norm" in name else shape[-1] ** -0.5)
        for name, shape in parameter_shapes(CONFIG).items()
    }
    weights = ArrayWeights({name: array.astype(np.float32) for name, array in arrays.items()})
    loaded = plugin_registry().load(backend)
    model = loaded.backend.build(CONFIG, TaskSpec(), weights, BuildOptions(dtype="float32"))
    model.config = CONFIG
    return model


@pytest.fixture(params=["fake", *FRAMEWORKS])
def model(request, rows_model):
    return rows_model if request.param == "fake" else built(request.param)


# -- leaving early ---------------------------------------------------------------------------------


def test_a_stream_that_is_left_frees_its_memory(model, monkeypatch):
    expected = ids(model)
    watched = Watched(model, monkeypatch)
    for stop in (list, lambda tokens: tokens.close()):
        tokens = stream_ids(model, model.config, PROMPTS, SETTINGS)
        for _ in range(5):
            next(tokens)
        assert watched.alive()
        stop(tokens)
        del tokens
        assert watched.alive() == 0
    assert ids(model) == expected


def test_many_prompts_that_are_left_free_their_memory(model, monkeypatch):
    watched = Watched(model, monkeypatch)
    found = generate_many_ids(model, model.config, itertools.repeat([2, 5]), SETTINGS, batch_size=3)
    next(found)
    assert watched.alive()
    found.close()
    assert watched.alive() == 0


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, CapacityError])
def test_an_error_inside_a_call_harms_nothing(model, monkeypatch, error):
    settings = dataclasses.replace(SETTINGS, eos_token_id=())
    prompts = PROMPTS[:1]
    expected = ids(model, prompts, settings)
    watched = Watched(model, monkeypatch)
    prefix = Prefix(model, model.config, PROMPTS[0][:3])
    held = watched.alive()
    for fails_at in (1, 4):
        watched.calls, watched.fails_at, watched.error = 0, fails_at, error("now")
        with pytest.raises(error, match="now"):
            generate_ids(model, model.config, prompts, settings, prefix=prefix)
        watched.error = None  # it holds the frames of the failed call
        assert watched.alive() == held
    watched.fails_at = None
    assert ids(model, prompts, settings) == expected
    assert generate_ids(model, model.config, prompts, settings, prefix=prefix) == expected


def test_an_error_in_a_users_function_harms_nothing(model, monkeypatch):
    expected = ids(model)
    watched = Watched(model, monkeypatch)

    def broken(row, tokens, logits):
        if len(tokens) > 7:
            raise LookupError("not in the table")
        return logits

    settings = GenerationSettings(max_new_tokens=9, processors=[broken], eos_token_id=())
    with pytest.raises(LookupError, match="not in the table"):
        ids(model, settings=settings)
    assert watched.made
    assert watched.alive() == 0
    assert ids(model) == expected


def test_rows_that_ended_free_their_part(rows_model, monkeypatch):
    """The cache of the last row alone is a quarter of the first one."""
    settings = GenerationSettings(
        max_new_tokens=8,
        eos_token_id=[40],
        allowed_tokens=lambda row, ids: [7] if row == 0 else [40],
    )
    watched = Watched(rows_model, monkeypatch)
    tokens = stream_ids(rows_model, rows_model.config, [[2, 5]] * 3 + [[2, 6]], settings)
    for _ in range(6):
        next(tokens)
    assert {ref().shape[0] for ref in watched.made if ref() is not None} == {1}


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_that_end_leave_the_others_their_tokens(model, copies):
    prompts = [*PROMPTS, [2, 40, 41]]
    settings = GenerationSettings(
        max_new_tokens=12, temperature=1.0, seed=11, num_return_sequences=copies, eos_token_id=()
    )
    free = ids(model, prompts, settings)
    stops = {free[row].token_ids[step] for row, step in ((0, 1), (3, 5))}
    found = ids(model, prompts, dataclasses.replace(settings, eos_token_id=stops))
    assert len({len(row.token_ids) for row in found}) >= 2
    for row, other in zip(found, free, strict=True):
        ends = [i + 1 for i, token in enumerate(other.token_ids) if token in stops]
        assert row.token_ids == other.token_ids[: ends[0] if ends else None]


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    """A machine with 1 MB of free memory."""

    def apply(backend):
        module = {"numpy": "gemma_hub_numpy.backend", "torch": "gemma_hub_torch.devices"}.get(
            backend, "gemma_hub_flax.devices"
        )
        monkeypatch.setattr(f"{module}.free_host_memory", lambda: 10**6)

    return apply


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_a_cache_that_does_not_fit_is_refused(backend, little_memory, monkeypatch):
    model = built(backend)
    expected = ids(model)
    little_memory(backend)
    assert ids(model) == expected  # small ones are not asked about
    monkeypatch.setattr(memory, "SMALL", 0)
    with pytest.raises(CapacityError, match=r"cache for 400 rows .* needs \d+\.\d GB, and 0\.0 GB"):
        ids(model, [[2, 5 + i % 9, i // 9] for i in range(400)])
    cache = model.init_cache(1, 8)
    with pytest.raises(CapacityError, match=r"cache for 9 rows of \d+ tokens"):
        model.gather_rows([cache], [(0, 0)] * 9, 500)
    monkeypatch.undo()
    assert ids(model) == expected


def test_the_message_has_the_figures(fake_config):
    slot = 2 * 1 * 1 * 4 * 4  # keys and values, layers, heads, head_dim, bytes
    rows, slots = 1000, 10_000_000_000 // 1000 // slot

    def check(free):
        memory.check_cache_fits(fake_config, rows, slots, 4, lambda: free)

    words = (
        rf"A cache for 1000 rows of {slots} tokens needs 10\.0 GB, and 4\.0 GB of memory are free, "
        rf"enough for {4_000_000_000 // slot} tokens in all\. Run fewer rows"
    )
    with pytest.raises(CapacityError, match=words):
        check(4_000_000_000)
    check(10_000_000_000)
    check(None)


def test_small_caches_cost_no_question(fake_config):
    def asked():
        raise AssertionError("was asked")

    slot = 2 * 4 * 4
    memory.check_cache_fits(fake_config, 1, memory.SMALL // slot, 4, asked)
    with pytest.raises(AssertionError, match="was asked"):
        memory.check_cache_fits(fake_config, 1, memory.SMALL // slot + 1, 4, asked)


def test_the_free_memory_is_read_where_it_can_be(tmp_path, monkeypatch):
    path = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", path)
    assert memory.free_host_memory() is None
    path.write_text("MemTotal:       24000000 kB\nMemAvailable:   12000000 kB\n")
    assert memory.free_host_memory() == 12_288_000_000
    path.write_text("MemTotal: 1 kB\n")
    assert memory.free_host_memory() is None
