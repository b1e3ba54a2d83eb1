"""Every backend of this repository passes the whole suite. The reference does in test_meta.py."""

import io

import pytest
from rich.console import Console

from gemma_hub_conformance.engine import load_subject, run_conformance


def _text(report) -> str:
    stream = io.StringIO()
    report.print(Console(file=stream, width=120))
    return stream.getvalue()


@pytest.mark.parametrize("name", ["numpy", "torch", "flax"])
def test_the_backend_is_certified(name, oracle):
    report = run_conformance(load_subject(name), oracle=oracle)
    assert report.exit_code == 0, _text(report)
    assert not report.missing
