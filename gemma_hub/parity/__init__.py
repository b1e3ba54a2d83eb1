"""Parity: backends compared with the float64 reference, in units of rounding noise."""
