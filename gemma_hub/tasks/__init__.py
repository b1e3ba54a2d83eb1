"""Tasks: what a user does with a model."""
