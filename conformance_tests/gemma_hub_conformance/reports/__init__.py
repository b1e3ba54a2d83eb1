"""A run as files: for people (HTML), for programs (JSON), for CI (JUnit), for a README (badge)."""

from gemma_hub_conformance.reports.certificate import read_certificate
from gemma_hub_conformance.reports.writing import write_reports

__all__ = ["read_certificate", "write_reports"]
