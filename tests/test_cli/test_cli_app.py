"""The application: help, versions, errors, exit codes, start-up, commands of plug-ins."""

import resource
import subprocess
import sys

import pytest

from gemma_hub.errors import GemmaHubError, InputError

CORE = ["generate", "parity", "backends", "doctor", "inspect"]
GREETING = """
from gemma_hub.plugins.hookspecs import hookimpl

@hookimpl
def gemma_hub_cli(app):
    @app.command()
    def greet(name: str):
        "Greet somebody."
        print("hello", name)
"""
BROKEN = """
from gemma_hub.plugins.hookspecs import hookimpl

@hookimpl
def gemma_hub_cli(app):
    raise RuntimeError("no commands today")
"""
GREEDY = GREETING.replace("def greet(name: str)", "def backends(name: str)")
FAILING = GREETING.replace(
    'print("hello", name)',
    'from gemma_hub.errors import InputError; raise InputError("name is wrong.")',
)


@pytest.fixture
def failing(monkeypatch, plugins):
    """Make the command `backends` raise."""

    def fail_with(error: BaseException) -> None:
        registry = plugins()

        def raise_it() -> None:
            raise error

        monkeypatch.setattr(type(registry), "backends", lambda self: raise_it())

    return fail_with


def test_help_lists_the_commands_and_exits_with_0(cli, plugins):
    plugins()
    result = cli("--help")
    assert result.exit_code == 0
    for name in CORE:
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("name", CORE)
def test_every_command_has_help(cli, name):
    result = cli(name, "-h")
    assert result.exit_code == 0
    assert "Usage: gemma-hub" in result.stdout


def test_no_command_shows_the_help_as_a_usage_error(cli, plugins):
    plugins()
    assert cli().exit_code == 2


def test_the_version_is_that_of_the_distribution(cli):
    from importlib.metadata import version

    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"gemma-hub {version('gemma-hub')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("generate",),
        ("generate", "tiny", "text", "--no-such-option"),
        ("generate", "tiny", "text", "--max-new-tokens", "many"),
        ("parity", "tiny", "--html", "/no/such/folder/report.html"),
    ],
)
def test_wrong_usage_exits_with_2_on_standard_error(cli, plugins, arguments):
    plugins()
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_our_errors_are_one_line_on_standard_error_and_exit_with_1(cli, failing):
    message = "top_p is 7; expected a number above 0 and up to 1. " * 5
    failing(InputError(message.strip()))
    result = cli("backends")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {message.strip()}\n"


def test_debug_shows_the_traceback_as_well(cli, failing):
    failing(GemmaHubError("it is wrong."))
    result = cli("--debug", "backends")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "raise error" in result.stderr
    assert result.stderr.endswith("Error: it is wrong.\n")


def test_an_error_that_is_ours_to_fix_is_not_hidden(cli, failing):
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("backends")


def test_ctrl_c_exits_with_130_and_says_nothing(cli, failing):
    failing(KeyboardInterrupt())
    result = cli("backends")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_a_plugin_adds_a_command(cli, plugins):
    plugins(greeting=GREETING)
    assert "greet" in cli("--help").stdout
    result = cli("greet", "you")
    assert (result.exit_code, result.stdout) == (0, "hello you\n")


def test_errors_of_a_plugin_s_command_are_shown_like_our_own(cli, plugins):
    plugins(greeting=FAILING)
    result = cli("greet", "you")
    assert (result.exit_code, result.stderr) == (1, "Error: name is wrong.\n")


@pytest.mark.parametrize(
    "source", [BROKEN, "raise SystemExit(9)", "import no_such_module", "x = ("]
)
def test_a_broken_plugin_leaves_every_other_command(cli, plugins, source):
    plugins(broken=source, greeting=GREETING)
    assert cli("--help").exit_code == 0
    assert cli("greet", "you").stdout == "hello you\n"
    assert cli("backends").exit_code == 0
    doctor = cli("doctor")
    assert doctor.exit_code == 1
    assert "broken" in doctor.stdout


def test_a_plugin_cannot_replace_a_command_of_the_core(cli, plugins):
    plugins(greedy=GREEDY)
    result = cli("backends")
    assert result.exit_code == 0
    assert "hello" not in result.stdout
    assert "backends" in cli("doctor").stdout


def test_a_core_command_asks_no_plugin_for_commands(cli, plugins, monkeypatch):
    registry = plugins(greeting=GREETING)
    monkeypatch.setattr(type(registry), "extend_cli", lambda *_: pytest.fail("asked"))
    assert cli("backends").exit_code == 0


def test_commands_are_left_out_if_the_registry_itself_fails(cli, plugins, monkeypatch):
    registry = plugins()

    def fail(self, app):
        raise RuntimeError("the registry is broken")

    monkeypatch.setattr(type(registry), "extend_cli", fail)
    result = cli("--help")
    assert result.exit_code == 0
    assert "the registry is broken" in result.stderr
    assert " generate " in result.stdout


def test_output_into_a_pipe_has_no_colour_and_is_not_wrapped(cli, plugins, monkeypatch):
    plugins(broken="raise ValueError('" + "a long reason " * 20 + "')")
    result = cli("backends")
    assert "\x1b" not in result.stdout
    assert ("a long reason " * 20).strip() in result.stdout


def test_help_is_quick_and_imports_no_array_framework():
    code = (
        "import sys\n"
        "sys.argv = ['gemma-hub', '--help']\n"
        "from gemma_hub.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'jax', 'jaxlib', 'flax', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, so that it is no longer on a busy machine.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "generate" in done.stdout
    assert min(times) < 1.0, times
