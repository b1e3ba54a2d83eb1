"""Checkpoints: folders of config.json, *.safetensors and a vocabulary, mapped and checked."""
