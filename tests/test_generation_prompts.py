"""Reading prompts: those of like length together, equal ones once."""

import itertools

import numpy as np
import pytest

from gemma_hub.generation import prompts as reading
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.prompts import like_lengths
from gemma_hub.generation.settings import GenerationSettings


def cost(groups, lengths):
    return sum(
        reading.CALL_COST + len(group) * max(lengths[place] for place in group) for group in groups
    )


def every_grouping(places):
    """All partitions of a few places."""
    if not places:
        yield []
        return
    first, *others = places
    for size in range(len(others) + 1):
        for joined in itertools.combinations(others, size):
            left = [place for place in others if place not in joined]
            for rest in every_grouping(left):
                yield [[first, *joined], *rest]


def test_no_grouping_costs_less():
    random = np.random.default_rng(5)
    sizes = set()
    for _ in range(60):
        lengths = random.choice([1, 8, 30, 100, 300, 900, 2000], random.integers(1, 7)).tolist()
        groups = like_lengths(lengths)
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        least = min(cost(each, lengths) for each in every_grouping(list(range(len(lengths)))))
        assert cost(groups, lengths) == least
        sizes.add(len(groups))
    assert sizes >= {1, 2, 3}


def test_one_long_prompt_is_read_by_itself():
    assert like_lengths([16, 512, 16, 20]) == [[0, 2, 3], [1]]
    assert like_lengths([16, 20, 16, 20]) == [[0, 1, 2, 3]]


def test_thousands_of_prompts_are_grouped_quickly():
    lengths = np.random.default_rng(6).integers(1, 4000, 2000).tolist()
    assert len(like_lengths(lengths)) > 10


@pytest.mark.parametrize("call_cost", [0, 3, 256])
def test_the_tokens_do_not_depend_on_the_groups(any_model, uncached_model, monkeypatch, call_cost):
    monkeypatch.setattr(reading, "CALL_COST", call_cost)
    random = np.random.default_rng(7)
    for _ in range(15):
        prompts = [random.integers(0, 48, random.integers(1, 25)).tolist() for _ in range(5)]
        prompts += [prompts[1], prompts[0]]
        settings = GenerationSettings(
            max_new_tokens=8,
            temperature=1.0,
            seed=3,
            eos_token_id=[4, 5, 6],
            num_return_sequences=2,
        )
        together = generate_ids(any_model, any_model.config, prompts, settings)
        for row, prompt in enumerate(prompts):
            # Row by row: the index counts, so the rows before it are asked for too.
            others = [[1]] * row
            alone = generate_ids(uncached_model, uncached_model.config, [*others, prompt], settings)
            assert together[2 * row : 2 * row + 2] == alone[-2:]


def test_equal_prompts_are_read_once(rows_model):
    settings = GenerationSettings(
        max_new_tokens=1, temperature=1.0, seed=3, num_return_sequences=3, eos_token_id=()
    )
    generate_ids(rows_model, rows_model.config, [[2, 5], [2, 9], [2, 5]], settings)
    (call,) = rows_model.calls
    assert call.input_ids.tolist() == [[2, 5], [2, 9]]


def test_short_prompts_are_not_padded_to_a_long_one(rows_model, monkeypatch):
    monkeypatch.setattr(reading, "CALL_COST", 8)
    settings = GenerationSettings(max_new_tokens=2, eos_token_id=())
    generate_ids(rows_model, rows_model.config, [[2, 5], [7] * 40, [2, 9, 9]], settings)
    assert [call.shape for call in rows_model.calls] == [(2, 3), (1, 40), (3, 1)]
