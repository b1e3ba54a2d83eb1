"""The PyTorch backend of gemma_hub."""
