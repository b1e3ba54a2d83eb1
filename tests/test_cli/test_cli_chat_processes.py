"""`gemma-hub chat` as a process, through a pipe and on a terminal; and that `generate` streams."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

RUN = "from gemma_hub.cli.app import main; main()"
# With Ctrl-C as a terminal has it, also where the tests run in the background, which ignores it.
OWN_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)


@pytest.fixture(scope="module")
def real():
    """Options that run the checkpoint `tiny` on the smallest backend."""
    pytest.importorskip("gemma_hub_numpy")
    pytest.importorskip("gemma_hub_tiny")
    return ["--backend", "numpy", "--dtype", "float32"]


def test_a_real_model_through_a_real_pipe(real):
    def run(*more):
        return subprocess.run(
            [sys.executable, "-c", RUN, "chat", "tiny", *real, "--max-new-tokens", "8", *more],
            input=b"Once upon a time there was a king.\n\nHe had a son. \\\nHis\n",
            capture_output=True,
            timeout=120,
            check=False,
        )

    drawn = ["--temperature", "1", "--seed", "3", "--no-turns"]
    done, again = run(*drawn), run(*drawn)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == again.stdout
    assert b"> " not in done.stdout
    assert b"\x1b" not in done.stdout
    assert len(done.stdout.strip()) > 20


class Screen:
    """A process on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL + RUN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull},
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until `pattern` appears after what earlier calls saw; all up to its end."""
        import select

        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.shown!r}"
            self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def screen(real):
    """`screen("chat", ...)` runs the command on a terminal."""
    pytest.importorskip("termios", reason="there are no pseudo-terminals")
    opened = []

    def run(command, *arguments):
        opened.append(Screen(command, "tiny", *arguments, *real))
        return opened[0]

    yield run
    for process in opened:
        process.close()


def test_generate_writes_the_text_as_it_is_made(screen):
    shown = screen("generate", "Once upon a time", "--max-new-tokens", "1500")
    shown.wait_for("Once upon a time.{40}")
    shown.type("\x03")
    assert shown.process.wait(60) == 130


def test_two_turns_on_a_real_terminal_the_second_interrupted(screen, tmp_path):
    path = tmp_path / "saved.json"
    shown = screen("chat", "--max-new-tokens", "1500", "--stop", "to him")
    shown.wait_for("/help lists commands.*> ")
    shown.type("Once there was a fox. One day\n")
    first = shown.wait_for(r"tokens at [\d.]+ a second[^;]*> ")
    shown.type("Then\n")
    shown.wait_for(r"Then\r\n.{40}")
    shown.type("\x03")
    shown.wait_for(r"\d+ tokens at [\d.]+ a second; interrupted.*> ")
    shown.type("half a line")
    shown.wait_for("half a line")
    time.sleep(1)  # Python's readline misses a Ctrl-C that comes before it waits for a key
    shown.type("\x03")
    shown.wait_for("Ctrl-C again, Ctrl-D or /quit leaves.*> ")
    shown.type(f"/save {path}\n")
    shown.wait_for("2 turns saved.*> ")
    shown.type("\x04")
    assert shown.process.wait(60) == 0
    messages = json.loads(path.read_bytes())
    assert [message["content"] for message in messages[::2]] == [
        "Once there was a fox. One day",
        "Then",
    ]
    assert messages[1]["content"] in first.replace("\r\n", "\n")
    assert 20 < len(messages[3]["content"]) < 4000
