"""Conversion: a checkpoint of any format opened, planned, and written in any other."""

from gemma_hub.conversion.convert import Conversion, convert, plan_conversion
from gemma_hub.conversion.describe import describe, tensor_hashes
from gemma_hub.conversion.opening import detect_format, open_source

__all__ = [
    "Conversion",
    "convert",
    "describe",
    "detect_format",
    "open_source",
    "plan_conversion",
    "tensor_hashes",
]
