"""Where a command's SOURCE is, once it is on this machine."""

from gemma_hub.hub import Part, repository


def local_source(source: str, part: Part = "model") -> str:
    """`source`; of a repository of the Hugging Face hub the path that it was fetched to.

    Called before a spinner or a bar of ours is drawn: huggingface_hub draws bars of its own.
    """
    if repository(source) is None:
        return source
    from gemma_hub.source import resolved

    return str(resolved(source, part))
