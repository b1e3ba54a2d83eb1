"""A backend for version 1.0 of the plug-in contract, kept as it was written."""
