"""The conformance suite of gemma_hub: is this backend the same Gemma?"""
