"""plugins/frozen_api_1: a plug-in of version 1.0 of the contract works, and nobody edited it."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from gemma_hub.plugins import checks
from gemma_hub.plugins.registry import PluginRegistry

if importlib.util.find_spec("gemma_hub_conformance") is None:
    pytest.skip("the conformance suite is not installed", allow_module_level=True)

from gemma_hub_conformance.engine import load_subject, run_conformance

FROZEN = Path(__file__).parents[2] / "plugins/frozen_api_1"

if not FROZEN.exists():
    pytest.skip("the frozen plug-in is not part of this copy", allow_module_level=True)

NAME = "frozen_api_1"
SHA256 = """
84b306d47c398b626561933cb45d4c33532797b359973bc36814b6a2742d4800  README.md
ea7e0f5f1e1d6a356aa0c02d76937d78819662769c73c72c8756c0b103b62c87  gemma_hub_frozen_api_1/__init__.py
d8a0936383ef5bd67462fa2fa310ba8b8507217d8fb3c927575ac86b58f82fb1  gemma_hub_frozen_api_1/backend.py
8e9ce4ac534672a31486e66acd3891ce46770bc0c0662d035f33ad0bf65e8737  gemma_hub_frozen_api_1/model.py
82e2e1602fdc126c207434288a1dc89f762c66d55d7c0c721a5e0eac2d149f5b  gemma_hub_frozen_api_1/plugin.py
3e25ce7aa33d0c9642d025a10ddb5d645d0bcc7633500f544775232fb33467da  pyproject.toml
""".strip()
"""Never to be changed; see the README there."""

PASSED = """
    L1.contract.devices L1.contract.logits_type L1.contract.inputs_unchanged
    L1.contract.repeated_call L1.contract.two_models L1.contract.refuses_dtype
    L1.contract.refuses_device L1.contract.refuses_task
    L2.forward.gqa.both_sides L2.forward.mqa.left_padding L2.forward.mha.right_padding
    L2.forward.untied.no_padding L2.forward.bias.no_padding L2.forward.shards.no_padding
    L2.forward.linear_rope.left_padding L2.forward.one_token
    L2.hidden_states.gqa L2.logits_to_keep.5 L2.masks.fully_masked_row
    L2.positions.offset_8190 L2.positions.gap L2.liveness.query_pre_attn_scalar
    L2.cache.gqa.left_padding L2.cache.chunks_of_3 L2.cache.idle_row L2.cache.capacity
    L2.cache.hidden_states L2.cache.logits_to_keep
    L4.generation.greedy L4.generation.stop L4.generation.sampled
    L5.causal.loss.left_padding L5.causal.loss.num_items
""".split()
REFUSED = """
    L1.contract.export_gqa L1.contract.logits_type_bfloat16 L2.inputs_embeds.unscaled
    L2.forward.softcap L2.forward.sliding_window L5.attentions.gqa L5.gradients.causal.gqa
    L5.base.last_hidden_state.no_padding L5.sequence.logits.no_padding L5.token.logits.no_padding
""".split()


@pytest.fixture
def registry(site) -> PluginRegistry:
    return site.install(FROZEN)


def test_it_is_as_it_was_frozen():
    found = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(FROZEN).as_posix()}"
        for path in sorted(FROZEN.rglob("*"))
        if path.is_file() and not _is_by_product(path.relative_to(FROZEN))
    ]
    assert found == SHA256.splitlines(), f"{FROZEN.name} is never edited; see its README.md"


def _is_by_product(path: Path) -> bool:
    """Whether Python or a tool made it."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def test_it_is_not_installed():
    assert importlib.util.find_spec("gemma_hub_frozen_api_1") is None


def test_the_registry_lists_it(registry):
    (info,) = (each for each in registry.backends() if each.name == NAME)
    assert (info.state, info.distribution, info.version) == (
        "ready",
        "gemma-hub-frozen-api-1",
        "0.1.0",
    )
    assert [p for p in registry.problems() if p.distribution == info.distribution] == []


def test_a_later_minor_version_of_the_contract_takes_it(site, monkeypatch):
    monkeypatch.setattr(checks, "API_VERSION", (1, 7))
    (info,) = (each for each in site.install(FROZEN).backends() if each.name == NAME)
    assert info.state == "ready"


def test_it_passes_the_cases_that_it_passed(registry):
    report = run_conformance(load_subject(NAME), [*PASSED, *REFUSED])
    verdicts = {result.id: (str(result.verdict), result.message) for result in report.results}
    wrong = {
        case: verdict
        for case, verdict in verdicts.items()
        if verdict[0] != ("pass" if case in PASSED else "unsupported")
    }
    assert wrong == {}
    assert len(verdicts) == len(PASSED) + len(REFUSED)
