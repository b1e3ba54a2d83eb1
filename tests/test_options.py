"""What a dataclass of switches says of itself, and the way to the command line and back."""

from dataclasses import dataclass

import pytest

from gemma_hub import Gemma
from gemma_hub.cli.texts import backend_options
from gemma_hub.errors import InputError
from gemma_hub.options import option_texts, read_switches, told_switches
from gemma_hub.plugins.registry import plugin_registry


@dataclass(frozen=True)
class Switches:
    """How it runs.

    Attributes:
        fast: runs like the wind, where there is a wind: on a hill, or
            at sea.
        quiet: says nothing; see silence.py, which says
            loud: nothing either.
        other: no switch of this class.
    """

    fast: bool = False
    quiet: bool = True
    untold: bool = False


class Undocumented(Switches):
    __doc__ = None


def test_switches_are_told_in_the_words_of_the_docstring():
    assert told_switches(Switches) == {
        "fast": "runs like the wind, where there is a wind: on a hill, or at sea",
        "quiet": "says nothing",
        "untold": "",
    }
    assert told_switches(Undocumented) == {"fast": "", "quiet": "", "untold": ""}


def test_what_is_told_is_what_can_be_given():
    for name in told_switches(Switches):
        assert getattr(read_switches(Switches, "it", {name: True}), name) is True


@pytest.mark.parametrize(
    "options",
    [{}, {"native": True, "compile": False}, {"depth": -3}, {"path": "a=b", "name": "x y"}],
    ids=str,
)
def test_options_as_texts_are_read_again(options):
    assert backend_options(option_texts(options)) == options


@pytest.mark.parametrize("name", ["torch", "flax", "numpy"])
def test_an_installed_backend_tells_the_options_that_it_has(name):
    (info,) = (each for each in plugin_registry().backends() if each.name == name)
    assert info.spec is not None
    assert info.spec.options
    with pytest.raises(InputError, match="no_such_option") as caught:
        Gemma.load("tiny", backend=name, backend_options={"no_such_option": True})
    for option, meaning in info.spec.options.items():
        assert option in str(caught.value)
        assert 10 < len(meaning) < 100
