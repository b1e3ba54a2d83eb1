"""`gemma-hub new-backend`: a plug-in distribution that works, for an author to begin with."""

from gemma_hub.new_backend.rendering import checked_name, distribution_name, render, rendered_files

__all__ = ["checked_name", "distribution_name", "render", "rendered_files"]
