"""run_bench: from what a user asks for to a report."""

from collections.abc import Sequence
from pathlib import Path

from gemma_hub.bench.checkpoints import SHAPES, random_checkpoint
from gemma_hub.bench.peers import TABLE, chosen, read_peers
from gemma_hub.bench.report import BenchReport
from gemma_hub.bench.running import Progress, Settings, prepare, run, subjects
from gemma_hub.cache import cache_folder
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.errors import InputError, nearest
from gemma_hub.plugins.registry import plugin_registry


def run_bench(
    settings: Settings,
    *,
    shape: str = "small",
    model: Path | None = None,
    backends: Sequence[str] = ("torch", "flax"),
    peers: Sequence[str] = (),
    peers_dir: Path = Path("bench/peers"),
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure backends and peers on one model, all of them in turn, several times.

    Args:
        settings: what is measured.
        shape: a key of `SHAPES`, whose random checkpoint is made where it is not there.
        model: a checkpoint folder in the Hugging Face layout, instead.
        backends: names; the ratios are to the first.
        peers: names in the table of `peers_dir`.
        peers_dir: folder of peers; without one there are no peers, and fewer limits are measured.
        cache: where random checkpoints and environments are kept; None for gemma_hub's own cache.
        progress: told what is done now.

    Raises:
        InputError: an argument is wrong.
        BackendNotFoundError, PluginError: there is no such backend, or it does not load.
        CheckpointError: the checkpoint cannot be made or read.
    """
    if shape not in SHAPES:
        hint = nearest(shape, SHAPES)
        raise InputError(
            f"There is no shape {shape!r}. {hint}{' ' if hint else ''}Known: {', '.join(SHAPES)}."
        )
    if len(set(backends)) < len(backends) or len(set(peers)) < len(peers):
        raise InputError("A backend or a peer is named twice. Name each once.")
    table = read_peers(peers_dir) if peers or (peers_dir / TABLE).is_file() else {}
    others = chosen(table, peers)
    _check_backends(backends)
    config = SHAPES[shape] if model is None else open_checkpoint(model).config
    settings.check(config)
    cache = cache_folder("bench") if cache is None else cache.expanduser()
    if model is None:
        folder = cache / "checkpoints" / shape
        model = random_checkpoint(
            folder, config, progress and (lambda n, of: progress(f"writing {folder}", n, of))
        )
    found = subjects(settings, model.resolve(), config, backends, others)
    report = BenchReport(model.name, config, settings, found)
    prepare(found, config, cache, progress)
    run(found, settings.rounds, progress)
    return report


def _check_backends(names: Sequence[str]) -> None:
    """Refuse a name that no backend has; one that is there and broken fails in its own process."""
    registry = plugin_registry()
    for name in set(names) - {info.name for info in registry.backends()}:
        registry.load(name)  # raises, unless it is a "distribution:name"
