"""passkey heatmap of a checkpoint folder"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.inference.options import InferenceOptions


@dataclass
class Config(InferenceOptions):
    """The verb `evaluate`: the passkey grid of a checkpoint folder.

    Attributes:
        output: folder for cells.jsonl, heatmap.csv and heatmap.png; default `<checkpoint>/passkey`.
        trained_length: drawn as a line in the heatmap; default from the checkpoint.
        devices, num_nodes: processes of a host, each with the whole model, and hosts; they share
            the cells. In a SLURM job both are the job's.
        context_parallel_size: 1, or the number of processes: they then share each prompt and its
            cache instead of the cells, for prompts that are too long for one.
    """

    output: str | None = None
    evaluation: PasskeyGridConfig = field(default_factory=PasskeyGridConfig)
    trained_length: int | None = None
    devices: int = 1
    num_nodes: int = 1
    context_parallel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("devices", "num_nodes", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


def run(config: Config) -> int:
    """The passkey grid of a checkpoint folder: cells.jsonl, heatmap.csv, heatmap.png, a table."""
    from rich.console import Console

    from ic.evaluation.passkey.suite import PasskeySuite
    from ic.evaluation.progress import cell_progress
    from ic.evaluation.report import write_report
    from ic.evaluation.runner import run_suite
    from ic.files.results import write_results
    from ic.files.run_folder import SuiteFolder
    from ic.inference.loading import load_source
    from ic.machine.launch import launch_ranks
    from ic.parallel.context_parallel import ContextParallel

    sharing = config.context_parallel_size
    ranks = launch_ranks(
        config.accelerator, config.devices, config.num_nodes, exchange_tensors=sharing > 1
    )
    if sharing not in (1, ranks.world_size):
        raise ValueError(
            f"context_parallel_size={sharing} with {ranks.world_size} processes: choose 1 or "
            f"{ranks.world_size}, or change devices or num_nodes"
        )
    loaded = load_source(config)
    model = loaded.model
    if sharing > 1:
        model.model.context_parallel = ContextParallel()
    is_first = ranks.global_rank == 0
    suite = PasskeySuite(config.evaluation)
    output = SuiteFolder(config.output or loaded.folder / suite.name)
    with cell_progress(suite, quiet=not is_first) as on_cell:
        cells = run_suite(
            model,
            loaded.tokenizer,
            suite,
            output.cells,
            on_cell,
            ranks=ranks if sharing == 1 else None,
            sharded=sharing > 1,
        )
    if not is_first:
        return 0
    picture = write_report(
        suite,
        cells,
        output,
        title=f"{loaded.name}: {suite.title}",
        trained_length=config.trained_length or loaded.trained_length,
    )
    write_results(output.results, asdict(config), suite.rows(cells))
    console = Console()
    console.print(suite.table(cells))
    console.print(f"{suite.picture}: {picture}", soft_wrap=True, highlight=False)
    return 0
