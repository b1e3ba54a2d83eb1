"""The command line: gemma-hub."""
