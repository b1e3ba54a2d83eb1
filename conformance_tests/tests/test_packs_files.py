"""Golden packs as files: written whole or not at all; what is damaged; bad outputs; commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from gemma_hub.errors import InputError
from gemma_hub_conformance.pack_commands import check_pack as check_command
from gemma_hub_conformance.pack_commands import golden_pack
from gemma_hub_conformance.packs import PackReport, check_pack, recording, write_pack, writing

UNIT, OTHER = "untied-float32", "mqa-bfloat16"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of two units."""
    folder = tmp_path_factory.mktemp("golden") / "pack"
    write_pack(folder, [UNIT, OTHER])
    return folder


@pytest.fixture
def right(pack: Path) -> Arrays:
    """What a perfect program computes for UNIT, in float32."""
    expected = load_file(pack / UNIT / "expected.safetensors")
    return {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in expected.items()
    }


@pytest.fixture
def judge(pack: Path, tmp_path: Path) -> Callable[..., PackReport]:
    """Judges arrays as the outputs of UNIT."""

    def judge(arrays: Arrays, only: tuple[str, ...] = (UNIT,)) -> PackReport:
        save_file(arrays, tmp_path / f"{UNIT}.safetensors")
        return check_pack(pack, tmp_path, only)

    return judge


@pytest.fixture
def run() -> Callable[..., Result]:
    """The two commands."""
    app = typer.Typer()
    app.command()(golden_pack)
    app.command()(check_command)
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that hold next to nothing, where only the folder matters."""

    def write_unit(folder: Path, *_: Any) -> dict[str, Any]:
        (folder / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr(writing, "_write_unit", write_unit)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- writing ---------------------------------------------------------------------------------------


def test_the_same_pack_has_the_same_bytes(pack: Path, tmp_path: Path) -> None:
    # Another process, so that nothing is remembered, and hashes of strings differ.
    code = f"from gemma_hub_conformance.packs import write_pack as w; w('p', ['{UNIT}', '{OTHER}'])"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    again, first = files_of(tmp_path / "p"), files_of(pack)
    assert again.keys() == first.keys()
    assert [name for name in first if again[name] != first[name]] == []


def test_the_manifest_says_what_is_in_the_files(pack: Path) -> None:
    manifest = json.loads((pack / "manifest.json").read_text("utf-8"))
    assert list(manifest["units"]) == sorted([UNIT, OTHER])
    for unit, entry in manifest["units"].items():
        for file, listed in (("expected", "tensors"), ("inputs", "inputs")):
            arrays = load_file(pack / unit / f"{file}.safetensors")
            assert {each["name"] for each in entry[listed]} == set(arrays)
            for each in entry[listed]:
                array = arrays[each["name"]]
                assert list(array.shape) == each["shape"]
                assert {"float64": "F64", "int32": "I32"}[array.dtype.name] == each["dtype"]
                assert each["what"]
                assert np.isfinite(array).all()
        noise = load_file(pack / unit / "noise.safetensors")
        assert all((value > 0).all() for value in noise.values())
        judged = {e["name"] for e in entry["tensors"] if e["vectors"] != "exact"}
        assert {name.removesuffix(".vectors") for name in noise} == judged
        assert all(each["formula"] for each in entry["tensors"])


def test_another_seed_is_another_pack(pack: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "p", [UNIT], seed=5)
    for file in ("model", "expected"):
        one = load_file(pack / UNIT / f"{file}.safetensors")
        other = load_file(tmp_path / "p" / UNIT / f"{file}.safetensors")
        name = next(iter(one))
        assert one.keys() == other.keys()
        assert not np.array_equal(one[name], other[name])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OS", "user"])
def test_after_a_failure_the_old_pack_is_there(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "p"
    shutil.copytree(pack, target)
    before = files_of(target)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(writing, "write_json", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write_pack(target, [UNIT], overwrite=True)
    assert files_of(target) == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("quick")
def test_overwriting_replaces_a_pack_and_nothing_else(pack: Path, tmp_path: Path) -> None:
    target = tmp_path / "p"
    shutil.copytree(pack, target)
    with pytest.raises(InputError, match="exists already"):
        write_pack(target, [UNIT])
    write_pack(target, [UNIT], overwrite=True)
    assert not (target / OTHER).exists()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not replaced"):
        write_pack(target, [UNIT], overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write_pack(target / "thesis.txt", [UNIT])
    (tmp_path / "no-pack").mkdir()
    (tmp_path / "no-pack" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not replaced"):
        write_pack(tmp_path / "no-pack", [UNIT], overwrite=True)


def test_wrong_arguments_of_writing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no unit 'gqa-float16'"):
        write_pack(tmp_path / "p", ["gqa-float16"])
    with pytest.raises(InputError, match="No unit was named"):
        write_pack(tmp_path / "p", [])
    with pytest.raises(InputError, match="The seed is -1"):
        write_pack(tmp_path / "p", [UNIT], seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_pack(tmp_path / "file" / "p", [UNIT])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_every_set_of_labels_is_another(pack: Path) -> None:
    labels = load_file(pack / UNIT / "inputs.safetensors")["labels"]
    assert len({each.tobytes() for each in labels}) == 8
    losses = load_file(pack / UNIT / "expected.safetensors")["losses"]
    assert len(set(losses)) == 8


def test_padding_is_zero_and_on_every_side(pack: Path) -> None:
    mask = recording.pack_batch().mask
    assert mask[0].all()
    assert not mask[1, 0]
    assert not mask[2, -1]
    assert not mask[3, [0, -1]].any()
    expected = load_file(pack / UNIT / "expected.safetensors")
    assert not expected["logits"][~mask].any()
    probs = np.moveaxis(expected["layers.0.attention_probs"], 1, 2)
    assert not probs[~mask].any()
    np.testing.assert_allclose(probs[mask].sum(axis=-1), 1.0, rtol=1e-12)


# -- judging ---------------------------------------------------------------------------------------


def test_one_wrong_element_is_found(judge: Any, right: Arrays) -> None:
    name = "layers.1.up"
    right[name][2, 4, 9] += 0.01
    report = judge(right)
    assert report.exit_code == 1
    assert report.units[0].first_wrong.name == name
    assert report.units[0].first_wrong.reason.endswith("at [2, 4, 9]")


def test_the_place_in_the_probabilities_is_that_of_the_tensor(judge: Any, right: Arrays) -> None:
    right["layers.0.attention_probs"][3, 5, 6, 4] += 0.01
    assert judge(right).units[0].first_wrong.reason.endswith("at [3, 5, 6, 4]")


def test_values_at_padding_are_not_read(judge: Any, right: Arrays) -> None:
    mask = recording.pack_batch().mask
    for name in ("embedding", "logits", "layers.0.q"):
        right[name][~mask] = np.nan
    assert judge(right).exit_code == 0


def test_nan_at_a_real_token_is_wrong(judge: Any, right: Arrays) -> None:
    right["logits"][0, 0, 0] = np.nan
    report = judge(right)
    assert report.exit_code == 1
    assert "1 of 1572 values at real tokens are NaN" in report.units[0].first_wrong.reason
    assert json.loads(report.to_json())["units"][0]["first_wrong"] == "logits"


def test_numbers_past_all_bounds_are_wrong(judge: Any, right: Arrays) -> None:
    found = right | {"logits": np.full(right["logits"].shape, 1e300)}
    assert judge(found).exit_code == 1


def test_narrow_results_are_wrong_where_wide_ones_are_asked_for(judge: Any, right: Arrays) -> None:
    found = {name: right[name].astype(ml_dtypes.bfloat16) for name in ("embedding", "logits")}
    report = judge(found)
    assert [each.passed for each in report.units[0].results] == [False, False]


def test_what_lies_between_is_named(judge: Any, right: Arrays) -> None:
    found = {name: right[name] for name in ("layers.0.output", "layers.1.q", "logits")}
    assert judge(found).exit_code == 0
    found["layers.1.q"] = found["layers.1.q"] * 1.01
    assert judge(found).units[0].between == ("layers.1.input_norm",)


def test_without_logits_it_is_vacuous(judge: Any, right: Arrays) -> None:
    assert judge({}).exit_code == 5
    del right["logits"]
    report = judge(right)
    assert (report.exit_code, report.missing) == (5, (UNIT,))
    assert report.summary.startswith("VACUOUS")


def test_without_only_every_model_of_one_type_is_needed(
    judge: Any, right: Arrays, pack: Path, tmp_path: Path
) -> None:
    assert judge(right, ()).exit_code == 0  # the only one in float32
    assert judge(right, (UNIT, OTHER)).missing == (OTHER,)
    both = shutil.copytree(pack, tmp_path / "both")
    manifest = json.loads((both / "manifest.json").read_text("utf-8"))
    manifest["units"][OTHER]["dtype"] = "float32"
    (both / "manifest.json").write_text(json.dumps(manifest))
    report = check_pack(both, tmp_path / f"{UNIT}.safetensors")
    assert (report.exit_code, report.missing) == (5, (OTHER,))


def test_a_wrong_token_is_wrong_and_an_open_one_is_not_read(judge: Any, right: Arrays) -> None:
    sampled = right["sampled_tokens"]
    sampled[1, 0, 0] = (sampled[1, 0, 0] + 1) % 131
    report = judge(right)
    assert report.units[0].first_wrong.name == "sampled_tokens"
    assert "1 tokens differ; that at [1, 0, 0] is" in report.units[0].first_wrong.reason


def test_open_tokens_are_not_compared(pack: Path, tmp_path: Path) -> None:
    expected = load_file(pack / OTHER / "expected.safetensors")
    tokens = expected["sampled_tokens"].astype(np.int64)
    tokens[tokens < 0] = 77
    arrays = {"logits": expected["logits"], "sampled_tokens": tokens}
    save_file(arrays, tmp_path / f"{OTHER}.safetensors")
    assert check_pack(pack, tmp_path, [OTHER]).exit_code == 0


def test_the_three_ways_to_name_outputs(pack: Path, right: Arrays, tmp_path: Path) -> None:
    save_file({f"{UNIT}/logits": right["logits"]}, tmp_path / "mine.safetensors")
    assert check_pack(pack, tmp_path / "mine.safetensors", [UNIT]).exit_code == 0
    assert check_pack(pack, tmp_path, [UNIT]).exit_code == 0
    (tmp_path / UNIT).mkdir()
    save_file({"embedding": right["embedding"]}, tmp_path / UNIT / "a.safetensors")
    assert len(check_pack(pack, tmp_path, [UNIT]).units[0].results) == 2
    save_file({"logits": right["logits"]}, tmp_path / UNIT / "b.safetensors")
    with pytest.raises(InputError, match="logits of untied-float32 is in"):
        check_pack(pack, tmp_path, [UNIT])


# -- bad files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logit": np.zeros((4, 12, 131), "f4")}, "logit is no tensor of the pack. Did you mean"),
        ({"logits": np.zeros((4, 131, 12), "f4")}, r"logits has shape \(4, 131, 12\), expected"),
        (
            {"logits": np.zeros((4, 12, 131), "i4")},
            "logits is I32, expected bfloat16, float16, float32, float64",
        ),
        ({"logits": np.zeros((4, 12, 131), "bool")}, "logits is BOOL, expected"),
        ({"greedy_tokens": np.zeros((3, 12), "f4")}, "greedy_tokens is float32, expected I32"),
        ({"logits": np.zeros((0,), "f4")}, r"logits has shape \(0,\)"),
        ({"embedding": np.zeros((4, 12, 50000), "f4")}, "embedding has shape"),
    ],
)
def test_outputs_in_another_form(judge: Any, arrays: Arrays, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(arrays)


def test_outputs_that_cannot_be_read(pack: Path, right: Arrays, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no "):
        check_pack(pack, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no \.safetensors files"):
        check_pack(pack, tmp_path)
    with pytest.raises(InputError, match="is a golden pack itself"):
        check_pack(pack, pack)
    file = tmp_path / f"{UNIT}.safetensors"
    save_file(right, file)
    whole = file.read_bytes()
    huge = (2**40).to_bytes(8, "little") + b"{}"
    for content in (b"", b"\0" * 7, whole[:-1], whole + b"\0", b"{" * 500, huge):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not a complete safetensors file"):
            check_pack(pack, tmp_path)
    file.rename(tmp_path / "untied-float3.safetensors")
    (tmp_path / "untied-float3.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match=r"belongs to no unit of the pack\. Did you mean 'un"):
        check_pack(pack, tmp_path)
    (tmp_path / "untied-float3.safetensors").unlink()
    (tmp_path / "mqa").mkdir()
    (tmp_path / "mqa" / "a.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match="is not called as a unit of the pack"):
        check_pack(pack, tmp_path)


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    """A pack to damage."""
    return shutil.copytree(pack, tmp_path / "copy")


@pytest.mark.parametrize("file", ["expected", "noise", "inputs", "model"])
def test_a_changed_byte_in_a_pack(copy: Path, right: Arrays, tmp_path: Path, file: str) -> None:
    save_file({"logits": right["logits"]}, tmp_path / f"{UNIT}.safetensors")
    path = copy / UNIT / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{file}.safetensors has another hash"):
        check_pack(copy, tmp_path / f"{UNIT}.safetensors")
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{file}.safetensors has [\d,]+ bytes"):
        check_pack(copy, tmp_path / f"{UNIT}.safetensors")
    path.unlink()
    with pytest.raises(InputError, match=f"{file}.safetensors is missing"):
        check_pack(copy, tmp_path / f"{UNIT}.safetensors")


def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        manifest = json.loads(path.read_text("utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "is no golden pack: it has no manifest.json"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text("{}"), "its format is another"),
        (edit(lambda m: m.update(version=99)), "has version 99; this program reads version 1"),
        (edit(lambda m: m.update(units={})), "it has no units"),
        (edit(lambda m: m["units"].update({"../x": {}})), "'../x' is no unit"),
        (edit(lambda m: m["units"][UNIT].pop("tensors")), "KeyError"),
        (edit(lambda m: m["units"][UNIT].pop("files")), "no list of its files"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(shape=[-1])), "has the shape"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(shape=None)), "is damaged"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(vectors="x")), "is 'F64' and 'x'"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(name="x")), "there is no 'x'"),
        (edit(lambda m: m["units"][UNIT]["tensors"].insert(0, 7)), "is damaged"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(shape=[4, 12, 9])), "is otherwise"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(dtype="I32")), "is otherwise"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(vectors="exact")), "is otherwise"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(vectors="whole")), "is otherwise"),
        (edit(lambda m: m["units"][UNIT]["tensors"][0].update(vectors="head")), "is otherwise"),
        (edit(lambda m: m["units"][UNIT]["tensors"][-3].update(vectors="token")), "is otherwise"),
    ],
)
def test_a_damaged_manifest(
    copy: Path, right: Arrays, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    save_file({"logits": right["logits"]}, tmp_path / f"{UNIT}.safetensors")
    change(copy / "manifest.json")
    with pytest.raises(InputError, match=message):
        check_pack(copy, tmp_path / f"{UNIT}.safetensors")


# -- the commands ----------------------------------------------------------------------------------


def test_the_commands(run: Any, right: Arrays, tmp_path: Path) -> None:
    made = run("golden-pack", tmp_path / "p", "--only", UNIT)
    assert made.exit_code == 0, made.output
    assert "MB; README.md says how to read it" in made.output
    again = run("golden-pack", tmp_path / "p", "--only", UNIT)
    assert again.exit_code == 2
    assert "exists already" in again.output
    out = tmp_path / f"{UNIT}.safetensors"
    save_file(right, out)
    result = run("check-pack", tmp_path / "p", out, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "RIGHT: 61 of 61 tensors are right, units: untied-float32" in result.output
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["exit_code"] == 0
    right["layers.0.gate"] *= 1.01
    save_file(right, out)
    result = run("check-pack", tmp_path / "p", out)
    assert result.exit_code == 1
    assert f"{UNIT}: the first tensor that is wrong is layers.0.gate" in result.output
    assert "layers.0.gate = post_attention_norm · gate_projᵀ" in result.output
    save_file({"embedding": right["embedding"]}, out)
    assert run("check-pack", tmp_path / "p", out).exit_code == 5
    assert run("check-pack", tmp_path / "p", tmp_path / "nothing").exit_code == 2
    assert run("check-pack", tmp_path / "p", out, "--only", "x").exit_code == 2
    assert run("check-pack", tmp_path / "p", out, "--json", tmp_path / "no" / "x").exit_code == 2
