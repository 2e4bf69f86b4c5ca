"""Commands of the documents, in the order in which a reader meets them, and what becomes of each.

A command is executed as it is written, or with fewer steps and shorter texts, or composed: its
overrides are made into a checked configuration (`tests/test_documents.py`). What is none of these
names the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a reader types from a fresh checkout on: each page uses what those before it have left.
_FIRST = [
    ROOT / name
    for name in ("docs/tutorial.md", "README.md", "docs/own_text.md", "docs/own_model.md")
]
DOCUMENTS = [
    *_FIRST,
    *(ROOT / name for name in ("CONTRIBUTING.md", "PROGRESS.md", "ROADMAP.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page not in _FIRST),
]
# Tables of these name commands in backquotes.
_NAMED = re.compile(r"`((?:python -m (?:ic|pytest)|make) [^`]+)`")
# What a line of a block begins with, if it is a command.
_BEGINS = re.compile(
    r"(python -m|python \S+\.py|make|bash|sbatch|srun|torchrun|pip|git|docker|helm|kubectl"
    r"|ansible-playbook|ansible-galaxy|apt-get|curl|export [A-Z]|cd|ls|cat|head|\.ci/\w+|\./\S+"
    r"|cosign|gh|[A-Z_]+=\S+)(?= |$)"
)
# Options that leave a command what it is and take it seconds; the last that fits.
_FIT = (
    "trainer.max_steps=4 trainer.val_check_interval=2 data.num_workers=0 trainer.max_time=null "
    "trainer.log_every_n_steps=1"
)
_PASSKEY = (
    "evaluation.lengths=[256] evaluation.depths=[0.5] evaluation.samples=1 "
    "evaluation.control_samples=1 evaluation.samples_by_length={}"
)
_TEXT = "data.context_length=128 data.tokens_per_batch=256 trainer.limit_val_batches=1"
_HEAL = "data.context_length=64 data.tokens_per_batch=128 optimizer.warmup_steps=1"
_PARITY = "lengths=[128] documents=2 parts=[logits,cache] accelerator=cpu"
SMALLER = [
    (r"make demo$|fit experiment=mla_tiny (name=(first|stopped|on_wandb)|ckpt_path=auto)", f"{_FIT} {_PASSKEY} data.context_length=256 data.tokens_per_batch=512 data.val_batches=1"),
    (r"fit experiment=text_small", f"{_FIT} {_TEXT} callbacks.checkpoint.every_n_steps=2"),
    (r"fit experiment=(sft|dpo)_tiny", f"{_FIT} data.tokens_per_batch=512 trainer.num_sanity_val_steps=1 trainer.limit_val_batches=1"),
    (r"fit experiment=heal run_id=mine", f"{_FIT} {_HEAL}"),
    (r"evaluate (run|checkpoint)=(runs|export)/mla_tiny(/default)?( evaluation.*)?$", _PASSKEY),
    (r"evaluate run=runs/mla_tiny/default suite=\[niah,mrcr\]", "suite.niah.lengths=[1024] suite.niah.samples=1 suite.mrcr.lengths=[4096] suite.mrcr.samples=1"),
    (r"evaluate checkpoint=export/mine", "suite.niah.lengths=[1024] suite.niah.samples=1 suite.perplexity.lengths=[128]"),
    (r"convert source=smollm2.gguf", "calibration_rows=2 calibration_tokens=128 accelerator=cpu parity=null overwrite=true"),
    (r"parity original=smollm2.gguf", _PARITY),
    (r"generate checkpoint=(runs|export)/(mla_tiny|text_small|sft_chatml|heal)", "accelerator=cpu"),
    (r"quantize source=runs/mla_tiny", "accelerator=cpu parity=null"),
    (r"export checkpoint=runs/mla_tiny/default .*licence", "overwrite=true"),
    (r"serve source=export/mine", "accelerator=cpu port=0 engine.cache_tokens=8192"),
]  # fmt: skip
# Executed as they are written.
AS_WRITTEN = [
    r"python -m ic$",
    r"python -m ic fit run=runs/(mla_tiny|stopped)/default$",
    r"python -m ic fit from=",
    r"python -m ic fit trainer\.max_step=5$",
    r"python -m ic compare runs/mla_tiny/default runs/mla_tiny/b$",
    r"python -m ic report ",
    r"python -m ic cost( |$)",
    r"python -m ic doctor$",
    r"python -m ic benchmark list_cases=true$",
    r"python -m ic benchmark serving checkpoint=runs/mla_tiny/default ",
    r"python -m ic ab simulate$",
    r"python -m ic ablation ablation\.sweep_file=",
    r"python -m ic fit experiment=mla_tiny debug=default --print_config$",
    r"python -m ic export checkpoint=(runs/mla_tiny/default|runs/heal/mine) output=\S+$",
    r"python -m ic make_tokenizer files=\[book\.txt\]",
    r"python -m ic make_preferences output=needles/val",
    r"python -m ic plan experiment=mla_32k plan\.gpu=h100$",
    r"python -m ic evaluate checkpoint=runs/mla_tiny/default/checkpoints/last evaluation.lengths=\[4194304\]",
    r"ls runs/mla_tiny/default$",
]  # fmt: skip
# Neither executed nor composed here, and why.
SKIPPED = {
    r"git clone|cd |export [A-Z]|[A-Z]\w+=\S+$|cat |head ": "sets the shell up, or shows a file",
    r"make ": "a target of make: .ci/run runs those that CI can",
    r"sbatch |srun |bash slurm/": "SLURM: make slurm runs the scripts",
    r"torchrun ": "several GPUs or hosts",
    r"docker |helm |kubectl ": "a container engine or a cluster: make images and make chart",
    r"ansible|apt-get ": "hosts with root: make hosts runs the playbooks",
    r"pip ": "an installation",
    r"python -m pytest ": "tests: make test runs them",
    r"curl |IC_SERVE_TOKEN": "a server that is up: tests/serving asks those routes",
    r"\.ci/|gh |cosign |OWNER=": "a release, or its signatures: a network",
    r"python -m tests\.chaos": "hours; tests/chaos runs it with 40 kills",
    r"python -m ic\.evaluation\.harness": "lm-eval's data: a network",
    r"python train_blockwise\.py|python -m ic (count|evaluate run=\S+ suite=copy_word)": "adds a part of its own: tests/test_adding.py and tests/model run it",
    r"python -m ic .*\.\.\.": "leaves out what the reader has",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        text: without its comment, its continued lines joined.
        after: the line that the page shows below it, if any.
        fate: as written, smaller, composed, or the reason why neither.
        more: overrides that make it smaller.
    """

    page: str
    text: str
    after: str
    fate: str
    more: tuple[str, ...] = ()

    @property
    def is_executed(self) -> bool:
        return self.fate in ("as written", "smaller")


@cache
def commands() -> list[Command]:
    """Each command once, by the page that has it first.

    Raises:
        ValueError: nothing is said of one.
    """
    found: dict[str, Command] = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if document.name in ("PROGRESS.md", "ROADMAP.md"):
            text = _NAMED.sub(r"\n```\n\1\n```\n", text)
        for block in re.findall(r"^ *```\w*\n(.*?)```", text, flags=re.S | re.M):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            for line, after in zip(lines, [*lines[1:], ""], strict=True):
                command = line.split(" #")[0].strip().removeprefix("$ ")
                if _BEGINS.match(command) and command not in found and not _is_tree(line):
                    fate, more = _fate(command)
                    found[command] = Command(document.name, command, after, fate, more)
    return list(found.values())


def _is_tree(line: str) -> bool:
    """A line of a listing of folders, such as `tensorboard/      the same`."""
    return re.match(r"\s*[\w.]+/ {2,}", line) is not None


def _fate(command: str) -> tuple[str, tuple[str, ...]]:
    if any(re.match(pattern, command) for pattern in AS_WRITTEN):
        return "as written", ()
    for pattern, more in SMALLER:
        if re.search(pattern, command) and "..." not in command:
            return "smaller", tuple(more.split())
    for pattern, reason in SKIPPED.items():
        if re.match(pattern, command):
            return reason, ()
    if command.startswith("python -m ic "):
        return "composed", ()
    raise ValueError(f"{command}: say in {Path(__file__).name} what becomes of it")
