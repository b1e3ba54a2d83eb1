"""backends, doctor, inspect and parity: what they print, and their exit codes."""

import dataclasses
import json

import numpy as np
import pytest

from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.parity.report import BackendRun, Cell, ParityReport, Row, Text, TokenCheck

BACKEND = """
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec

@hookimpl
def gemma_hub_backends():
    return [BackendSpec(name="{name}", api_version="1.0", factory="x:Y", requires=({requires}),
                        features=frozenset({{"cache", "export"}}), summary="fake")]
"""
READY = BACKEND.format(name="ready_one", requires="")
LACKING = BACKEND.format(name="lacking", requires='"no-such-distribution>=9",')


# -- backends and doctor ---------------------------------------------------------------------------


def test_backends_shows_state_features_problem_and_remedy(cli, plugins):
    plugins(one=READY, two=LACKING, three="raise ValueError('bad day')")
    result = cli("backends")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["ready_one", "ready"] in [line[:2] for line in lines]
    assert ["lacking", "unavailable"] in [line[:2] for line in lines]
    assert ["three", "quarantined"] in [line[:2] for line in lines]
    assert "cache, export" in result.stdout
    assert "no-such-distribution" in result.stdout
    assert "bad day" in result.stdout
    assert result.stdout.count("What to do: ") == 2


def test_backends_as_json(cli, plugins):
    plugins(one=READY, two=LACKING)
    records = {record["name"]: record for record in json.loads(cli("backends", "--json").stdout)}
    assert records["ready_one"]["state"] == "ready"
    assert records["ready_one"]["spec"]["features"] == ["cache", "export"]
    assert "no-such-distribution" in records["lacking"]["problem"]


def test_backends_shows_the_options_that_a_plug_in_tells(cli, plugins):
    told = READY.replace("summary=", "options={'turbo': 'goes [b]faster[/b]'}, summary=")
    later = told.replace('"1.0"', '"9.0"').replace("ready_one", "later").replace("turbo", "warp")
    plugins(one=told, two=LACKING, three=later)
    result = cli("backends")
    assert "options: --option NAME=VALUE" in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if "faster" in line] == [
        ["ready_one", "turbo", "goes", "[b]faster[/b]"]
    ]
    records = {record["name"]: record for record in json.loads(cli("backends", "--json").stdout)}
    assert records["ready_one"]["spec"]["options"] == {"turbo": "goes [b]faster[/b]"}
    assert records["lacking"]["spec"]["options"] == {}


def test_backends_without_options_show_no_table_of_them(cli, plugins):
    plugins(one=READY)
    assert "option" not in cli("backends").stdout


def test_without_any_backend_it_says_what_to_install(cli, plugins):
    plugins()
    result = cli("backends")
    assert result.exit_code == 0
    assert "pip install gemma-hub-torch" in result.stdout


def test_doctor_passes_a_healthy_installation(cli, plugins, tmp_path, monkeypatch):
    plugins(one=READY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    result = cli("doctor")
    assert (result.exit_code, "All is well." in result.stdout) == (0, True), result.stdout
    assert json.loads(cli("doctor", "--json").stdout)["is_healthy"] is True


def test_doctor_fails_with_each_problem_and_its_remedy(cli, plugins):
    plugins(one=READY, two=LACKING)
    result = cli("doctor")
    assert result.exit_code == 1
    assert "no-such-distribution" in result.stdout
    assert "What to do: " in result.stdout
    assert "All is well." not in result.stdout
    values = json.loads(cli("doctor", "--json").stdout)
    assert values["is_healthy"] is False
    assert values["problems"]


def test_doctor_without_any_backend_fails(cli, plugins):
    plugins()
    result = cli("doctor")
    assert result.exit_code == 1
    assert "pip install gemma-hub-torch" in result.stdout


# -- inspect ---------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    arrays = {
        name: np.full(shape, 0.25, np.float32) for name, shape in parameter_shapes(config).items()
    }
    save_checkpoint(tmp_path / "model", config, ArrayWeights(arrays))
    return tmp_path / "model"


def test_inspect_describes_a_folder(cli, plugins, checkpoint):
    plugins()
    result = cli("inspect", str(checkpoint))
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["num_hidden_layers", "2"] in rows
    assert ["type", "float32"] in rows
    assert "model.safetensors" in result.stdout
    assert "model.layers.1" not in result.stdout
    assert "No problems." in result.stdout


def test_inspect_lists_the_tensors_on_request(cli, plugins, checkpoint):
    plugins()
    listed = cli("inspect", str(checkpoint), "--tensors").stdout
    row = next(line.split() for line in listed.splitlines() if "1.self_attn.q_proj" in line)
    assert row[1:5] == ["32", "x", "16", "float32"]
    record = json.loads(cli("inspect", str(checkpoint), "--json", "--tensors").stdout)
    assert len(record["tensors"]) == 20
    assert "tensors" not in json.loads(cli("inspect", str(checkpoint), "--json").stdout)


def test_inspect_fails_with_the_problems_of_a_damaged_folder(cli, plugins, checkpoint):
    plugins()
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    result = cli("inspect", str(checkpoint))
    assert result.exit_code == 1
    assert "problem: " in result.stdout
    assert "No problems." not in result.stdout
    record = cli("inspect", str(checkpoint), "--json")
    assert record.exit_code == 1
    assert json.loads(record.stdout)["problems"]


def test_inspect_of_nothing_fails(cli, plugins, tmp_path):
    plugins()
    result = cli("inspect", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "nothing" in result.stdout
    named = cli("inspect", "nothing")
    assert (named.exit_code, named.stdout) == (1, "")
    assert "There is no installed checkpoint 'nothing'" in named.stderr


# -- parity ----------------------------------------------------------------------------------------


def _report(passed: bool, error: str = "") -> ParityReport:
    cells = {
        "torch": Cell(1.02, 1.1, True, "fine"),
        "flax": Cell(1.0, 0.9, True, "fine") if passed else Cell(4e5, 1e6, False, "error is large"),
    }
    check = TokenCheck("torch", "greedy", 0, (4, 5), "equal", None, "all equal")
    flax = dataclasses.replace(check, backend="flax", verdict="equal" if passed else "different")
    checks = (check, flax)
    checks += tuple(dataclasses.replace(c, kind="sampled", verdict="tie") for c in checks)
    runs = [BackendRun("torch"), BackendRun("flax", error=error)]
    return ParityReport(
        source="tiny",
        config={
            "num_hidden_layers": 2,
            "hidden_size": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 9,
        },
        dtype="float32",
        backends=tuple(runs),
        rows=() if error else tuple(Row(p, 3e-7, (0.9, 1.1), cells) for p in ("layer 0", "logits")),
        tokens=() if error else checks,
        texts=(Text("Once [bold]upon[/bold] a time " * 9, (2, 3), (4, 5), (4, 6), "a", "b"),),
        limits={"ratio": 5.0, "worst_ratio": 5.0},
        seeds={"sampling": 7, "witnesses": [1, 2]},
        sampling={"temperature": 0.8, "max_new_tokens": 2},
        versions={"Python": "3"},
        created="2025-01-01T00:00:00+00:00",
    )


@pytest.fixture
def parity_gives(monkeypatch):
    """`parity_gives(report)` makes it the result; gives the list of calls."""

    def give(report: ParityReport) -> list[dict]:
        calls: list[dict] = []

        def fake(source, **arguments):
            calls.append({"source": source, **arguments})
            return report

        monkeypatch.setattr("gemma_hub.parity.parity", fake)
        return calls

    return give


def test_parity_passes_with_0_and_prints_every_layer(cli, parity_gives):
    calls = parity_gives(_report(passed=True))
    result = cli("parity", "tiny")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["layer", "0", "3.0e-07", "1.02", "(1.10)", "1.00", "(0.90)"] in rows
    assert "PASSED  torch, flax: every layer within 1.02 times" in result.stdout
    assert "[bold]upon[/bold]" in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    assert calls == [
        {
            "source": "tiny",
            "backends": ["torch", "flax"],
            "texts": None,
            "dtype": "float32",
            "max_new_tokens": 32,
            "witnesses": 8,
            "progress": None,
            "device": "auto",
            "seed": 7,
        }
    ]


def test_parity_fails_with_1_and_marks_the_place(cli, parity_gives):
    parity_gives(_report(passed=False))
    result = cli("parity", "tiny")
    assert result.exit_code == 1
    assert "\u2717 4.0e+05" in result.stdout
    assert "FAILED  flax diverges first at layer 0: error is large." in result.stdout


def test_parity_shows_why_a_backend_did_not_run(cli, parity_gives):
    parity_gives(_report(passed=True, error="RuntimeError: out of memory " * 20))
    result = cli("parity", "tiny")
    assert result.exit_code == 1
    assert "flax: " + "RuntimeError: out of memory " * 20 in result.stdout


def test_parity_passes_its_options_on(cli, parity_gives):
    calls = parity_gives(_report(passed=True))
    cli(
        "parity", "tiny", "--backends", " torch , numpy,", "--dtype", "bfloat16", "--device", "cpu",
        "--text", "one", "--text", "two", "--max-new-tokens", "4", "--witnesses", "3",
        "--seed", "9",
    )  # fmt: skip
    assert calls[0]["backends"] == ["torch", "numpy"]
    assert calls[0]["texts"] == ["one", "two"]
    assert (calls[0]["dtype"], calls[0]["device"]) == ("bfloat16", "cpu")
    assert (calls[0]["max_new_tokens"], calls[0]["witnesses"], calls[0]["seed"]) == (4, 3, 9)


@pytest.mark.parametrize("passed", [True, False])
def test_parity_writes_its_files_whatever_the_verdict(cli, parity_gives, tmp_path, passed):
    parity_gives(_report(passed))
    html, values = tmp_path / "report.html", tmp_path / "report.json"
    cli("parity", "tiny", "--html", str(html), "--json", str(values))
    assert json.loads(values.read_text(encoding="utf-8"))["passed"] is passed
    assert html.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_parity_says_that_a_file_cannot_be_written(cli, parity_gives, monkeypatch, tmp_path):
    parity_gives(_report(passed=True))

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ParityReport, "to_json", full)
    result = cli("parity", "tiny", "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 1
    assert "report.json cannot be written: No space left on device." in result.stderr


def test_parity_and_generate_on_the_tiny_checkpoint(cli, tmp_path):
    from gemma_hub.plugins.registry import plugin_registry

    ready = {info.name for info in plugin_registry().backends() if info.state == "ready"}
    if "tiny" not in plugin_registry().checkpoints() or "numpy" not in ready:
        pytest.skip("needs gemma-hub-tiny and gemma-hub-numpy")
    story = cli(
        "generate", "tiny", "Once upon a time", "--backend", "numpy", "--dtype", "float32",
        "--max-new-tokens", "8", "--json",
    )  # fmt: skip
    assert len(json.loads(story.stdout)["token_ids"]) == 8
    path = tmp_path / "parity.json"
    result = cli(
        "parity", "tiny", "--backends", "numpy", "--text", "Once upon a time", "--json", str(path),
        "--max-new-tokens", "8", "--witnesses", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout
    report = json.loads(path.read_text(encoding="utf-8"))
    generated = json.loads(story.stdout)["token_ids"]
    assert report["texts"][0]["greedy_token_ids"] == generated
    assert cli("inspect", "tiny").exit_code == 0
