"""docs/reference/cli.md has exactly the commands, arguments, options and defaults of the app."""

import re
from pathlib import Path

import pytest
import typer

from gemma_hub.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
if not PAGE.is_file():
    pytest.skip("needs docs/, which this copy of the tests has not", allow_module_level=True)
TOP, *SECTIONS = re.split(r"^## gemma-hub ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
DOCUMENTED = {section.split()[0]: section for section in SECTIONS}
COMMANDS = typer.main.get_command(app).commands
HELP = {"--help", "-h"}


def _options(section: str) -> set[str]:
    """The options in the first column of the tables of a section."""
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    return {option for cell in cells for option in re.findall(r"`(--[a-z-]+)`", cell)}


def _real_options(command) -> set[str]:
    options = (p for p in command.params if p.param_type_name == "option")
    return {name for p in options for name in (*p.opts, *p.secondary_opts)} - HELP


def test_every_command_of_the_core_has_a_section_in_order():
    assert list(DOCUMENTED) == list(COMMANDS)


def test_the_options_of_the_application_are_documented():
    assert _options(TOP) == _real_options(typer.main.get_command(app))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_a_command_are_documented(name):
    assert _options(DOCUMENTED[name]) == _real_options(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_of_a_command_are_in_its_heading(name):
    arguments = [p for p in COMMANDS[name].params if p.param_type_name == "argument"]
    heading = DOCUMENTED[name].splitlines()[0].split()
    assert heading == [name, *(argument.name.upper() for argument in arguments)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documented_defaults_are_the_real_ones(name):
    documented = {}
    for line in DOCUMENTED[name].splitlines():
        if line.startswith("| `--"):
            cells = [cell.strip() for cell in line.split("|")]
            documented[re.findall(r"--[a-z-]+", cells[1])[0]] = cells[2].strip("`")
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and isinstance(
            parameter.default, (int, float, str)
        ):
            switch = {True: "on", False: "off"}
            expected = (
                switch[parameter.default]
                if isinstance(parameter.default, bool)
                else f"{parameter.default}"
            )
            if isinstance(parameter.default, float):
                expected = f"{parameter.default:g}"
            assert documented[parameter.opts[0]] == expected
