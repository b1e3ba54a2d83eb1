"""`gemma-hub verify`: whether a checkpoint still computes what its probe says."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_hub.cli import texts as shared
from gemma_hub.cli.console import out, show_table, table, waiting, write
from gemma_hub.cli.sources import local_source

if TYPE_CHECKING:
    from gemma_hub.probe import Probe, Verification


def verify(
    source: shared.Source,
    backends: Annotated[
        str | None,
        typer.Option(help="Backends to run it on, with commas between them.", show_default="one"),
    ] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Run a checkpoint on its probe and compare; exit code 1 if one backend differs."""
    from gemma_hub.conversion import open_source
    from gemma_hub.probe import needed_probe

    path = local_source(source)
    opened = open_source(path)[1]
    probe = needed_probe(opened.path, opened.config)
    found: dict[str, Verification] = {}
    for name in backends.split(",") if backends else (None,):
        with waiting(f"Running {name or 'it'}"):
            model = shared.loaded(path, probe.task, name and name.strip(), dtype, device)
            found[f"{model.backend.name}, {model.dtype}, {model.device}"] = model.verify(probe)
    if as_json:
        records = {run: verification.to_dict() for run, verification in found.items()}
        write(json.dumps({"source": source, "runs": records}, indent=2) + "\n")
    else:
        _print(source, probe, found)
    if not all(verification.passed for verification in found.values()):
        raise typer.Exit(1)


def _print(source: str, probe: "Probe", found: "dict[str, Verification]") -> None:
    listed = table("run", "error / rounding noise", "worst value", "noise", "")
    for run, verification in found.items():
        listed.add_row(
            run,
            f"{verification.ratio:.3g}",
            f"{verification.worst_ratio:.3g}",
            verification.noise,
            "same" if verification.passed else "DIFFERENT",
        )
    makers = ", ".join(f"{name} {version}" for name, version in probe.made_by.items())
    show_table(out(), f"{source}: {probe.values.size} values ({probe.dtype}; {makers})", listed)
    for run, verification in found.items():
        if not verification.passed:
            out().print(f"{run}: {verification.reason}", soft_wrap=True)
