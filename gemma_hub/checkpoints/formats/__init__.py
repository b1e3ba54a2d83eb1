"""Checkpoint formats: where Gemma weights come from and go to besides the Hugging Face folder."""
