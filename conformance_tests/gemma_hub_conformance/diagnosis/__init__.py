"""What is wrong with a backend that failed: the known bug, the layer, the input, a reproduction."""

from gemma_hub_conformance.diagnosis.diagnosing import diagnose
from gemma_hub_conformance.diagnosis.finding import Diagnosis
from gemma_hub_conformance.diagnosis.reproduction import write_reproduction

__all__ = ["Diagnosis", "diagnose", "write_reproduction"]
