"""The suite runs on the device that it is asked for."""

import dataclasses
from typing import ClassVar

import pytest

from gemma_hub.backend import BuildOptions
from gemma_hub.errors import InputError
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.mutants.bank import StandInBackend, control
from gemma_hub_conformance.package import PackageFailure
from gemma_hub_numpy.model import Reference

CASES = ["L2.forward.one_token", "L2.cache.capacity"]


class TwoDevices(StandInBackend):
    """Notes where it is asked to build."""

    asked: ClassVar[list[str]] = []

    def build(self, config, task, weights, options):
        self.asked.append(options.device)
        return super().build(config, task, weights, dataclasses.replace(options, device="cpu"))


@pytest.mark.parametrize(("device", "reported"), [("second", "second"), ("auto", "cpu")])
def test_every_model_is_built_on_the_device(device, reported):
    TwoDevices.asked.clear()
    subject = dataclasses.replace(control(), backend=TwoDevices(Reference), device=device)
    report = run_conformance(subject, CASES)
    assert report.exit_code == 0
    assert report.device == reported
    assert set(TwoDevices.asked) == {device}


def test_a_new_process_builds_on_the_device_too():
    package = load_subject("numpy", device="cpu").package
    assert package is not None
    with pytest.raises(PackageFailure, match="'moon'"):
        package.whole(BuildOptions(dtype="float32", device="moon"), 60.0)


def test_a_device_that_there_is_not():
    with pytest.raises(InputError, match="no device 'moon'; it has cpu"):
        load_subject("numpy", device="moon")
