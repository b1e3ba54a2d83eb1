"""The same Gemma, in any framework, with a proof."""
