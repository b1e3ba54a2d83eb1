"""What the suite says of Hugging Face transformers, case by case; and parity with it."""

import re
from pathlib import Path

import pytest

from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.parity import parity
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.report import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "transformers-backend.md"
REFUSED = "UnsupportedFeature: Backend 'transformers' does not support "
OTHER_TOKEN = "logits: error is "
DIFFERENCES = {
    "L2.liveness.rms_norm_offset": (Verdict.ERROR, REFUSED + "'rms_norm_offset'"),
    "L2.liveness.query_pre_attn_scalar": (Verdict.ERROR, REFUSED + "'query_pre_attn_scalar'"),
    "L5.sequence.pooling.pad_id_inside": (Verdict.FAIL, OTHER_TOKEN),
    "L5.sequence.pooling.mask_over_pad_ids": (Verdict.FAIL, OTHER_TOKEN),
    "L5.sequence.inputs_embeds": (Verdict.FAIL, OTHER_TOKEN),
    "L5.token.loss.num_items": (Verdict.ERROR, REFUSED + "'num_items_in_batch'"),
}
"""Every case that it does not pass. Why is in the page."""
UNCLAIMED = {"cache_rows", "greedy_steps", "sliding_window", "softcap"}
"""Features that it refuses, as it must."""


def test_it_passes_every_case_but_those_of_the_page(oracle):
    report = run_conformance(load_subject("transformers"), oracle=oracle)
    assert not report.missing
    found = {r.id: r for r in report.results if r.verdict in (Verdict.FAIL, Verdict.ERROR)}
    assert {id_: result.message for id_, result in found.items()}.keys() == DIFFERENCES.keys()
    for id_, (verdict, message) in DIFFERENCES.items():
        assert found[id_].verdict == verdict, id_
        assert found[id_].message.startswith(message), id_
        # Another token's logits, not a little more rounding.
        assert found[id_].ratio is None or found[id_].ratio > 1e5, id_
    unclaimed = {r.id for r in report.results if r.verdict == Verdict.UNSUPPORTED}
    assert unclaimed == {case.id for case in all_cases().values() if case.needs & UNCLAIMED}


def test_the_page_has_every_difference_and_no_other():
    rows = re.findall(r"^\| `(L\d\.[^`]+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert dict(rows) == {id_: verdict.value for id_, (verdict, _) in DIFFERENCES.items()}
    assert len(rows) == len(DIFFERENCES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["untied", "linear_rope"])
def test_parity_with_the_torch_backend(name, dtype, tmp_path):
    checkpoint = CHECKPOINTS[name]
    save_checkpoint(tmp_path / name, checkpoint.config, checkpoint.weights(dtype))
    report = parity(
        tmp_path / name,
        backends=["torch", "transformers"],
        dtype=dtype,
        max_new_tokens=6,
        witnesses=4,
        device="cpu",
    )
    assert [run.name for run in report.backends] == ["torch", "transformers"]
    assert report.passed, report.verdict
