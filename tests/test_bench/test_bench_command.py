"""`gemma-hub bench`, end to end on a tiny model; peers that fail; arguments that are wrong."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma_hub.bench import measuring
from gemma_hub.bench.benchmark import run_bench
from gemma_hub.bench.peers import chosen, read_peers
from gemma_hub.bench.running import Settings, prepare, subjects
from gemma_hub.cli.app import app
from gemma_hub.plugins.registry import plugin_registry

SETTINGS = Settings(batches=(2,), prompt=6, new=2, rounds=1, repeats=1)
BACKENDS = [i.name for i in plugin_registry().backends() if i.state == "ready"]
BACKEND = next((name for name in ("numpy", "torch", "flax") if name in BACKENDS), None)
needs_backend = pytest.mark.skipif(BACKEND is None, reason="no backend is installed")


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments], prog_name="gemma-hub")


@pytest.mark.skipif("torch" not in BACKENDS, reason="the torch backend is not installed")
def test_options_reach_the_backend(checkpoint, tmp_path):
    asked = f"--model {checkpoint} --backend torch --dtype float32 --prompt 6 --new 2 --batch 2"
    asked += f" --rounds 1 --repeats 1 --peers-dir {tmp_path}"
    right = bench(*asked.split(), "--option", "native=true")
    assert right.exit_code == 0, right.output
    assert "option native=True" in right.output
    wrong = bench(*asked.split(), "--option", "native=1")
    assert wrong.exit_code == 1
    assert "expected True or False" in " ".join(wrong.output.split())


@needs_backend
def test_the_command_measures_and_its_json_is_consistent(checkpoint, peers_dir, tmp_path):
    files = {name: tmp_path / name for name in ("json", "markdown", "plot")}
    result = bench(
        *f"--model {checkpoint} --backend {BACKEND} --dtype float32 --prompt 6 --new 2".split(),
        *f"--batch 1 --batch 2 --rounds 2 --repeats 1 --peers-dir {peers_dir} --peer wrong".split(),
        *f"--json {files['json']} --markdown {files['markdown']} --plot {files['plot']}".split(),
    )
    assert result.exit_code == 1, result.output  # a peer failed
    report = json.loads(files["json"].read_text())
    ours, limits, wrong = report["subjects"]
    assert (ours["name"], ours["kind"], ours["error"]) == (BACKEND, "backend", "")
    assert len(ours["samples"]) == 2
    figures = ours["figures"]
    for rows in (1, 2):
        rates = [
            rows * 2 / (full - one)
            for sample in ours["samples"]
            for pair in [sample["decode"][str(rows)]]
            for one, full in zip(pair["one_s"], pair["full_s"], strict=True)
            if full > one
        ]
        figure = figures[f"decode_{rows}_tokens_per_s"]
        assert figure["median"] == pytest.approx(statistics.median(rates))
    prefill = [6 / s for sample in ours["samples"] for s in sample["prefill_s"]]
    assert figures["prefill_tokens_per_s"]["median"] == pytest.approx(statistics.median(prefill))
    assert figures["load_s"]["median"] > 0
    assert figures["prefill_tokens_per_s"]["ratio"] == 1
    assert ours["samples"][0]["versions"]["numpy"]
    assert limits["samples"][0]["read_bytes_per_s"]
    assert report["limits"]["float32"]["read_bytes_per_s"] > 1e8
    assert "no_such_name" in wrong["error"]
    assert "no_such_name" in result.stdout
    assert "no_such_name" in files["markdown"].read_text()
    assert files["plot"].read_text().startswith("<svg")


@pytest.mark.skipif(not measuring.STATUS.is_file(), reason="needs Linux")
def test_peers_that_fail_are_reported_and_the_others_go_on(
    checkpoint, peers_dir, tmp_path, monkeypatch
):
    create = venv.create  # without pip, which takes seconds to install
    monkeypatch.setattr(venv, "create", lambda home, with_pip: create(home))
    report = run_bench(
        SETTINGS,
        model=checkpoint,
        backends=(),
        peers=("short", "homeless", "dead", "good"),
        peers_dir=peers_dir,
        cache=tmp_path,
    )
    found = {subject.name: subject for subject in report.measured()}
    assert "(1, 0) new tokens, expected (1, 1)" in found["short"].error
    assert "pip failed: " in found["homeless"].error
    assert "No module named pip" in found["homeless"].error
    assert "SIGKILL" in found["dead"].error
    assert found["good"].error == ""
    (sample,) = found["good"].samples
    assert sample["versions"]["no-such-distribution"] == "not installed"
    peaks = [sample["memory"][stage] for stage in ("start", "load", "first_token", "end")]
    assert 0 < peaks[0]["private_bytes"] <= peaks[-1]["private_bytes"]
    assert peaks[-1]["resident_bytes"] < 10**9


def test_a_peer_gets_the_checkpoint_in_the_format_that_it_reads(
    checkpoint, tiny_config, peers_dir, tmp_path
):
    good = read_peers(peers_dir)["good"]
    named = [dataclasses.replace(good, format=name) for name in ("pytorch_bin", "no_such_format")]
    limits, converted, unknown = subjects(SETTINGS, checkpoint, tiny_config, (), named)
    prepare([limits, converted, unknown], tiny_config, tmp_path)
    assert limits.request["checkpoint"] == str(checkpoint)
    assert (Path(converted.request["checkpoint"]) / "pytorch_model.bin").is_file()
    assert converted.error == ""
    assert "no_such_format" in unknown.error


def test_private_memory_is_seen_while_it_is_held():
    code = (
        "import numpy, time; from gemma_hub.bench.measuring import PeakMemory; m = PeakMemory();"
        "before = m.peaks(); x = numpy.ones(50_000_000, numpy.uint8); time.sleep(0.2); del x;"
        "print(before and m.peaks()['private_bytes'] - before['private_bytes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() != "None":
        assert int(done.stdout) == pytest.approx(50_000_000, rel=0.1)


def test_measuring_imports_nothing_of_gemma_hub():
    code = Path(measuring.__file__).read_text()
    assert not re.search(r"^\s*(from|import) gemma_hub", code, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--shape smal", "Did you mean 'small'"),
        ("--shape small --model x", "give one of them"),
        ("--batch 0", "--batch is 0"),
        ("--batch 2 --batch 2", "different values"),
        ("--new 0", "--new is 0"),
        ("--rounds -1", "--rounds is -1"),
        ("--prompt 9000", "the model has 8192"),
        ("--prompt 1 --new 8192", "need 8193 positions"),
        ("--dtype int4", "There is no dtype 'int4'"),
        ("--backend nowhere", "nowhere"),
        ("--backend x --backend x", "named twice"),
        ("--model no-such-folder", "no-such-folder"),
        ("--peer good --peers-dir no-such-folder", "bench/peers"),
        ("--peer goud --peers-dir {peers}", "Did you mean 'good'"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_made(arguments, said, peers_dir, tmp_path):
    cache = tmp_path / "cache"
    if "--backend" not in arguments and BACKEND is not None:
        arguments += f" --backend {BACKEND}"
    result = bench(*arguments.format(peers=peers_dir).split(), "--cache", str(cache))
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert not cache.exists()


@pytest.mark.parametrize("table", ["[a]", "[a", "[a]\nscript = 'x.py'", "[a]\nscript='b'\nz=1"])
def test_a_wrong_table_of_peers_is_said(table, tmp_path):
    (tmp_path / "peers.toml").write_text(table)
    result = bench("--peers-dir", str(tmp_path), "--cache", str(tmp_path / "cache"))
    assert result.exit_code == 1
    assert "peers.toml" in result.output


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path):
    result = bench("--json", str(tmp_path / "no" / "file"), "--cache", str(tmp_path / "cache"))
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_the_peers_of_the_repository_are_a_valid_table():
    folder = Path(__file__).parents[2] / "bench" / "peers"
    if not folder.is_dir():
        pytest.skip("needs bench/, which this copy of the tests has not")
    peers = read_peers(folder)
    names = [name for name in peers if name != "torch-limits"]
    assert [peer.name for peer in chosen(peers, names)] == [*names, "torch-limits"]
    for peer in peers.values():
        assert all("==" in r or "@" in r for r in peer.requirements + peer.without_dependencies)
        compile(peer.script.read_text(), str(peer.script), "exec")
