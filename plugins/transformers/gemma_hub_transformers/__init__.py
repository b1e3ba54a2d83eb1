"""Hugging Face transformers as a backend of gemma_hub, to compare with."""
