"""Writes `expected.json`: what NVIDIA/RULER's own scripts make and score.

    python -m tests.evaluation.ruler.from_ruler CHECKOUT     # at ic.evaluation.ruler.task.COMMIT

Needs wonderwords, nltk, scipy and tqdm. Two things of theirs are replaced. Sentences are split by
our function, because nltk's model is a download. And for lists of words and documents
`random.sample(all, k)` is `random.sample(all, len(all))[:k]`, as in our tasks, so that more words
are more text.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ic.datamodules.sentences import split_sentences
from ic.evaluation.ruler.task import COMMIT
from tests.evaluation.ruler.texts import ESSAY, HOTPOTQA, SQUAD

EXPECTED = Path(__file__).parent / "expected.json"
SEED = 42
# Units and `max_seq_length` of each task; where there are two, RULER makes a list of another size.
CASES: dict[str, list[tuple[int, int]]] = {
    "niah_single_1": [(3, 4096)],
    "niah_single_2": [(40, 4096), (90, 4096)],
    "niah_single_3": [(40, 4096)],
    "niah_multikey_1": [(50, 4096)],
    "niah_multikey_2": [(4, 4096)],
    "niah_multikey_3": [(3, 4096)],
    "niah_multivalue": [(50, 4096)],
    "niah_multiquery": [(50, 4096)],
    "vt": [(6, 4096)],
    "cwe": [(15, 2048), (12, 4096)],
    "fwe": [(60, 4096)],
    "qa_1": [(2, 4096), (5, 4096), (14, 4096)],
    "qa_2": [(3, 4096), (5, 4096)],
}
EXAMPLE_UNITS = 5
ANSWERS = (
    ("", ["1234567"]),
    ("  1234567, 7654321 ", ["1234567", "7654321", "1111111"]),
    ("12345678", ["1234567"]),
    ("the North\x00of it", ["north", "south"]),
    ("north\nof", ["north of"]),
    ("NORTH \u00d6F IT", ["north \u00f6f it", "x"]),
    ("\x07 abc\x1f\x1f", ["abc"]),
    ("a\u0130b", ["a\u0130B"]),
    ("no such thing", ["", "yes"]),
)


def _module(checkout: Path, name: str, arguments: Sequence[str]) -> ModuleType:
    """A script of theirs, as with these arguments."""
    sys.argv = [name, *arguments]
    spec = importlib.util.spec_from_file_location(name.split("/")[-1], checkout / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prompts(checkout: Path, task: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    constants = _module(checkout, "scripts/data/synthetic/constants", []).TASKS[config["task"]]
    template = constants["template"] + constants["answer_prefix"]
    found = []
    for units, length in CASES[task]:
        arguments = [f"--{name}={value}" for name, value in config["args"].items()]
        script = f"scripts/data/synthetic/{config['task']}"
        common = (
            f"--save_dir=. --save_name=x --tokenizer_path=x --num_samples=1 --random_seed={SEED}"
        )
        module = _module(
            checkout,
            script,
            [
                *shlex.split(common),
                f"--max_seq_length={length}",
                f"--tokens_to_generate={constants['tokens_to_generate']}",
                f"--template={template}",
                *arguments,
            ],
        )
        module.__dict__["sent_tokenize"] = split_sentences
        random.seed(SEED)
        np.random.seed(SEED)
        if task == "vt":
            text, outputs = module.generate_input_output(units, 1, 4)
            example, known = module.generate_input_output(EXAMPLE_UNITS, 1, 4, is_icl=True)
            example = example.replace("12345", str(np.random.randint(10000, 99999)))
            text = f"{example} {' '.join(known)}\n\n{text}"
        elif task == "fwe":
            size = (length - constants["tokens_to_generate"]) // 50
            text, outputs, _ = module.generate_input_output(10**9, units, vocab_size=size)
        elif task.startswith("qa"):
            text, outputs = module.generate_input_output(1, units)
        else:
            text, outputs = module.generate_input_output(units)
        at = text.rfind(constants["answer_prefix"][:10])
        found.append(
            {
                "task": task,
                "units": units,
                "max_seq_length": length,
                "input": text[:at],
                "answer_prefix": text[at:],
                "outputs": outputs,
                "tokens_to_generate": constants["tokens_to_generate"],
            }
        )
    return found


def main(checkout: Path) -> None:
    at = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
    assert at == COMMIT, at
    import yaml

    sys.path.insert(0, str(checkout / "scripts/data/synthetic"))
    sys.path.insert(0, str(checkout / "scripts/data"))
    tokenizer = ModuleType("tokenizer")
    tokenizer.__dict__["select_tokenizer"] = lambda *_: type(
        "Characters", (), {"text_to_tokens": staticmethod(list)}
    )
    sys.modules["tokenizer"] = tokenizer
    folder = checkout / "scripts/data/synthetic/json"
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(HOTPOTQA))
    (folder / "english_words.json").write_text("{}")  # an LFS pointer in the checkout
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": " ".join(ESSAY)}))
    draw = random.sample
    prompts = []
    for task, config in yaml.safe_load((checkout / "scripts/synthetic.yaml").read_text()).items():
        as_needed = config["task"] not in ("common_words_extraction", "qa")
        random.sample = draw if as_needed else lambda all_, k: draw(all_, len(all_))[:k]
        prompts += _prompts(checkout, task, config)
    random.sample = draw
    source = (checkout / "scripts/eval/evaluate.py").read_text()
    source = re.search(r"def postprocess_pred.*?return predict_str\n", source, re.DOTALL).group()
    names: dict[str, Any] = {"re": re}
    exec(source, names)
    metrics = _module(checkout, "scripts/eval/synthetic/constants", [])
    scores = []
    for text, outputs in ANSWERS:
        cleaned = names["postprocess_pred"](text, {})
        both = [
            metric([cleaned], [outputs])
            for metric in (metrics.string_match_all, metrics.string_match_part)
        ]
        scores.append({"text": text, "outputs": outputs, "all": both[0], "part": both[1]})
    about = f"Made by NVIDIA/RULER (Apache-2.0) at {COMMIT}; see from_ruler.py."
    content = {"about": about, "prompts": prompts, "scores": scores}
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
