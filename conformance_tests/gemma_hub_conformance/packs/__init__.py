"""Golden packs: what is right, as files, for those whose target runs no Python.

`write_pack` makes one, `check_pack` judges outputs by it. See docs/how-to/golden-packs.md.
"""

from gemma_hub_conformance.packs.judging import PackReport, check_pack
from gemma_hub_conformance.packs.writing import UNITS, write_pack

__all__ = ["UNITS", "PackReport", "check_pack", "write_pack"]
