"""Probes: what a checkpoint computes on a fixed input, kept beside its weights and checked later.

A hash says that bytes are the same. A probe says that a model is the same: whatever the format, the
framework and the precision, it must give these numbers up to rounding.
"""

from gemma_hub.probe.making import probe_of_model, reference_probe
from gemma_hub.probe.record import PROBE_FILE, Noise, Probe, needed_probe, read_probe
from gemma_hub.probe.verifying import Verification, verify

__all__ = [
    "PROBE_FILE",
    "Noise",
    "Probe",
    "Verification",
    "needed_probe",
    "probe_of_model",
    "read_probe",
    "reference_probe",
    "verify",
]
