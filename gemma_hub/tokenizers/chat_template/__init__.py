"""Renders chat templates: programs in Jinja that come with a checkpoint, so hostile ones."""

from gemma_hub.tokenizers.chat_template.rendering import plain_data, render

__all__ = ["plain_data", "render"]
