"""`gemma-hub formats`: the checkpoint formats that are read and written here."""

from gemma_hub.cli.console import out, table


def formats() -> None:
    """List the checkpoint formats, and what each of them still needs."""
    from gemma_hub.plugins.registry import plugin_registry

    listed = table("format", "from", "what it is", "needs")
    for name, info in plugin_registry().formats().items():
        listed.add_row(
            name, f"{info.distribution} {info.version}", info.summary, info.problem or info.missing
        )
    out().print(listed)
