"""The Flax (JAX, flax.nnx) backend of gemma_hub."""
