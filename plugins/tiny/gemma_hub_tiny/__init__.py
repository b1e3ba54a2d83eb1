"""The checkpoint 'tiny' of gemma_hub: a small Gemma that writes fairy tales."""
