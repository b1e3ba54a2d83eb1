"""The float64 reference of gemma_hub, as an ordinary plug-in."""
