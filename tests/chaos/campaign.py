"""Kills runs at random events, resumes them, and compares what they end with.

`python -m tests.chaos.campaign --kills 300 --seed 1 --processes 8` prints a summary in JSON, and
ends with 1 if anything differed; the folders of such runs are kept. The same seed places the same
kills.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.chaos.compare import differences
from tests.chaos.rank import Kill, run_rank
from tests.conftest import LATE_IMPORTS, host_store

# A run of 16 steps in which everything happens: the context length grows at the tenth step, a
# validation and a checkpoint fall together at the twelfth, the others apart.
RUN = (
    "fit",
    "experiment=mla_tiny",
    "name=chaos",
    "run_id=run",
    "model.num_hidden_layers=1",
    "data.context_length=256",
    "data.tokens_per_batch=256",
    "data.val_batches=2",
    "callbacks.context_length.start_length=128",
    "callbacks.context_length.threshold=0.01",
    "callbacks.checkpoint.every_n_steps=4",
    "callbacks.checkpoint.mode=max",
    "callbacks.passkey.every_n_steps=8",
    "callbacks.passkey.cheap_lengths=[128]",
    "trainer.max_steps=16",
    "trainer.val_check_interval=6",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "optimizer.warmup_steps=4",
    "evaluation.lengths=[256]",
    "evaluation.samples=1",
    "evaluation.samples_by_length={}",
    "evaluation.depths=[0.5]",
    "evaluation.control_samples=1",
)
RUN_FOLDER = Path("runs/chaos/run")
# Name of a kind of run: its ranks, and what it is given beyond RUN.
# Ranks have no launcher here: one that a signal ends before they meet is given up after a while.
MEETING = "strategy.rendezvous_timeout_s=60"
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "one rank, dropout": (1, ("model/adapter=lora", "model.adapter.lora_dropout=0.2")),
    "two ranks, ddp": (2, ("strategy=ddp", MEETING)),
    "two ranks, fsdp2": (2, ("strategy=fsdp2", MEETING)),
}
SIGNALS = {signal.SIGKILL: 14, signal.SIGTERM: 3, signal.SIGINT: 3}
# A process that takes longer hangs; the machine may be busy.
HANGS_AFTER_S = 120


@dataclass
class Chain:
    """A run that was killed, resumed and killed again until it ended."""

    kind: str
    folder: Path
    kills: list[Kill] = field(default_factory=list)
    codes: list[list[int | None]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def launch(
    kind: str, folder: Path, kill: Kill | None, attempt: int, *args: str
) -> list[int | None]:
    """Run every rank until it ends -> exit codes, negative for a signal, None if it hung.

    What is printed and done lies in `<folder>/attempt<n>-rank<r>.log` and `.trace`.
    """
    num_ranks, options = KINDS[kind]
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    store = host_store()
    command = (*RUN, *options, f"trainer.devices={num_ranks}", *args)
    run = folder / RUN_FOLDER
    processes: list[Any] = [
        context.Process(
            target=run_rank,
            args=(
                rank,
                num_ranks,
                store.port,
                command,
                run,
                folder / f"attempt{attempt}-rank{rank}.trace",
                kill,
            ),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    ends = time.monotonic() + HANGS_AFTER_S
    if kill is not None and kill.together:
        processes[kill.rank].join(HANGS_AFTER_S)
        if (processes[kill.rank].exitcode or 0) < 0:
            for process in processes:
                process.kill()
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
        process.close()
    return codes


def undisturbed(kind: str, folder: Path) -> dict[tuple[int, str], int]:
    """Run a kind once -> how many events each (rank, phase) has."""
    folder.mkdir(parents=True)
    codes = launch(kind, folder, None, 0)
    if any(codes):
        raise RuntimeError(f"the undisturbed run of {kind!r} ended with {codes}: see {folder}")
    events: Counter[tuple[int, str]] = Counter()
    for rank in range(KINDS[kind][0]):
        for line in (folder / f"attempt0-rank{rank}.trace").read_text().splitlines():
            events[rank, line.partition("\t")[0]] += 1
    return dict(events)


def draw_kill(draw: random.Random, events: dict[tuple[int, str], int]) -> Kill:
    """A kill at any event of any phase; phases are equally likely, so that short ones come too."""
    rank, phase = draw.choice(sorted(events))
    number = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    return Kill(
        phase,
        draw.randrange(events[rank, phase]),
        number,
        rank,
        delay_s=draw.choice((0.0, 0.0, 0.0, draw.uniform(0.0, 0.03))),
        together=phase == "start" or draw.random() < 0.5,
    )


def run_chain(
    kind: str, folder: Path, seed: str, expected: Path, events: dict[tuple[int, str], int]
) -> Chain:
    """Kill a run up to four times, resume it to its end and compare; a good one is removed."""
    draw = random.Random(seed)
    chain = Chain(kind, folder)
    folder.mkdir(parents=True)
    wanted = draw.choice((1, 2, 3, 4))
    for attempt in range(20):
        kill = draw_kill(draw, events) if len(chain.kills) < wanted else None
        codes = launch(kind, folder, kill, attempt, *(["ckpt_path=auto"] if attempt else []))
        chain.codes.append(codes)
        if None in codes:
            chain.differences.append(f"attempt {attempt} ({kill}) hung: {codes}")
            break
        if kill is not None and any(codes):
            chain.kills.append(kill)
        elif any(codes):
            chain.differences.append(f"attempt {attempt} ended with {codes}")
            break
        else:
            break
    if not chain.differences:
        chain.differences = differences(expected / RUN_FOLDER, folder / RUN_FOLDER)
    if not chain.differences:
        shutil.rmtree(folder)
    return chain


def run_campaign(
    kinds: Sequence[str], num_kills: int, seed: int, folder: Path, processes: int = 1
) -> list[Chain]:
    """Chains of each kind in turn until `num_kills` signals have ended a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.rank", *LATE_IMPORTS])
    with ThreadPoolExecutor(processes) as pool:
        undone = {kind: folder / kind.replace(", ", "-").replace(" ", "-") for kind in kinds}
        traced = dict(zip(kinds, pool.map(undisturbed, kinds, undone.values()), strict=True))
        chains: list[Chain] = []
        index = 0
        while sum(len(chain.kills) for chain in chains) < num_kills:
            batch = []
            for _ in range(processes):
                kind = kinds[index % len(kinds)]
                where = undone[kind].with_name(f"{undone[kind].name}-{index}")
                args = (kind, where, f"{seed} {index}", undone[kind], traced[kind])
                batch.append(pool.submit(run_chain, *args))
                index += 1
            chains += [each.result() for each in batch]
            if index > 4 * num_kills + 4 * processes:
                raise RuntimeError("most kills come after the end of the run")
    return chains


def summarize(chains: Sequence[Chain]) -> dict[str, Any]:
    """Counts of kills, and what differed where."""
    kills = [(chain, kill) for chain in chains for kill in chain.kills]
    return {
        "kills": len(kills),
        "runs": len(chains),
        "by_kind": Counter(chain.kind for chain, _ in kills),
        "by_phase": Counter(kill.phase for _, kill in kills),
        "by_signal": Counter(signal.Signals(kill.number).name for _, kill in kills),
        "by_rank": Counter(kill.rank for _, kill in kills),
        "differences": [
            {
                "kind": chain.kind,
                "folder": str(chain.folder),
                "kills": [str(kill) for kill in chain.kills],
                "codes": chain.codes,
                "found": chain.differences,
            }
            for chain in chains
            if chain.differences
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    chains = run_campaign(given.kinds, given.kills, given.seed, folder, given.processes)
    summary = summarize(chains)
    print(json.dumps({**summary, "minutes": round((time.monotonic() - began) / 60, 1)}, indent=2))
    return 1 if summary["differences"] else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
