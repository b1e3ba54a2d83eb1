"""Plug-ins: hooks, specs and the registry that keeps a broken one from harming the rest."""
