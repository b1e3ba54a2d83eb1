"""The commands on a repository, in this process and in processes of their own."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gemma_hub.cli.app import app
from gemma_hub.conversion import tensor_hashes

NAME = "google/gemma-test"
LAST = "model-00002-of-00002.safetensors"
COMMAND = [sys.executable, "-c", "from gemma_hub.cli.app import main; main()"]


def cli(*arguments):
    result = CliRunner().invoke(app, list(arguments), prog_name="gemma-hub")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(environment, *arguments, **changes):
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_inspect(hub, shards):
    hub.add(NAME, shards)
    result = cli("inspect", NAME, "--json", "--hashes")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["problems"] == []
    assert {file["name"] for file in record["files"]} == set(shards)
    assert all(tensor["sha256"] for tensor in record["tensors"])
    assert len(hub.asked("GET", "api")) == 1


def test_convert(hub, shards, tmp_path):
    hub.add(NAME, shards)
    assert cli("convert", NAME, "out").exit_code == 0
    assert tensor_hashes(tmp_path / "out") == tensor_hashes(NAME)
    assert cli("convert", f"{NAME}@main", "--plan").exit_code == 0


def test_convert_with_the_config_of_a_repository(hub, shards):
    hub.add(NAME, shards)
    hub.add("a/config", {"config.json": shards["config.json"]})
    assert cli("convert", NAME, "out", "--config", "a/config").exit_code == 0
    assert cli("convert", NAME, "more", "--config", "a/other").exit_code == 1


def test_tokenize_fetches_the_tokenizer(hub, shards):
    hub.add(NAME, shards)
    result = cli("tokenize", NAME, "the king", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["source"] == NAME
    assert hub.fetched == ["tokenizer.model"]


def test_generate(hub, shards):
    pytest.importorskip("gemma_hub_numpy", reason="needs a backend")
    hub.add(NAME, shards)
    arguments = ("the king", "--backend", "numpy", "--dtype", "float32", "--json")
    result = cli("generate", NAME, *arguments, "--max-new-tokens", "2")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["source"] == NAME
    assert len(record["token_ids"]) == 2


def test_a_refusal_is_one_line_and_exit_code_1(hub):
    for command in (("inspect", "no/such"), ("convert", "no/such", "out")):
        result = cli(*command)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert "has no repository 'no/such'" in result.stderr


# -- in processes of their own, which huggingface_hub's own environment variables steer ------------


def test_a_process_fetches_and_the_next_is_offline(stand_in, shards, environment):
    stand_in.add(NAME, shards)
    first = run(environment, "inspect", NAME, "--json")
    assert json.loads(first.stdout)["problems"] == []
    assert first.stderr == ""  # bars are for terminals
    assert stand_in.fetched == sorted(shards)
    stand_in.forget()
    again = run(environment, "inspect", NAME, "--json", HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout
    assert again.stderr == ""
    assert stand_in.requests == []


def test_a_process_without_the_hub(stand_in, shards, environment):
    stand_in.add(NAME, shards)
    first = run(environment, "inspect", NAME, "--json")
    stand_in.stop()
    again = run(environment, "inspect", NAME, "--json")
    assert again.stdout == first.stdout
    assert f"The connection to {environment['HF_ENDPOINT']} failed" in again.stderr
    assert "Using the copy in the cache" in again.stderr


def test_two_processes_at_once(stand_in, shards, environment):
    stand_in.add(NAME, shards)
    command = [*COMMAND, "inspect", NAME, "--json"]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0] == results[1]
    assert stand_in.fetched == sorted(shards)


def test_a_killed_process_leaves_what_the_next_can_use(stand_in, shards, environment, cache):
    stand_in.add(NAME, shards)
    process = subprocess.Popen([*COMMAND, "inspect", NAME], env=environment)

    def kill(request):
        if request.path.endswith(LAST):
            process.kill()
            process.wait()

    stand_in.before = kill
    assert process.wait(60) == -9
    stand_in.before = None
    stand_in.forget()
    assert "No problems" in run(environment, "inspect", NAME).stdout
    assert "config.json" not in stand_in.fetched
    assert LAST in stand_in.fetched


def test_nothing_is_imported_before_an_id_is_used(environment, tmp_path):
    code = "import sys, gemma_hub.source, gemma_hub.gemma; print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def shown_on_a_terminal(environment, *arguments):
    """What a command writes to standard error where that is a terminal."""
    import fcntl
    import pty
    import struct
    import termios

    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=child
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # at the end Linux gives an error, others nothing
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(60) == 0
    return shown.decode()


@pytest.mark.skipif(os.name == "nt", reason="terminals of Unix")
def test_bars_on_a_terminal(stand_in, shards, environment):
    stand_in.add(NAME, shards)
    shown = shown_on_a_terminal(environment, "convert", NAME, "--plan")
    assert all(f"{name[-35:]}: 100%" in shown for name in shards)
    stand_in.add("a/other", shards)
    quiet = environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    assert shown_on_a_terminal(quiet, "convert", "a/other", "--plan") == ""
