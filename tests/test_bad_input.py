"""Bad input on the command line: one readable line and exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

BAD = {
    "verb": (["fitt"], "unknown verb 'fitt'; did you mean fit"),
    "experiment": (
        ["fit", "experiment=mla_33k"],
        "unknown experiment 'mla_33k'; did you mean mla_32k",
    ),
    "group option": (["fit", "data=passkeys"], "unknown data 'passkeys'; did you mean passkey"),
    "group": (["fit", "modell=mla_tiny"], "unknown key 'modell'; did you mean model"),
    "key of another verb": (
        ["evaluate", "checkpoint=x", "trainr.max_steps=2"],
        "unknown key 'trainr.max_steps'; known: accelerator, attention, cache_dtype, checkpoint",
    ),
    "far from any key": (["fit", "zzz=1"], "unknown key 'zzz'; known: allow_config_change, callb"),
    "grammar": (
        ["fit", "trainer.max_steps=[1"],
        "trainer.max_steps: Value '[1' of type 'str' could not be converted",
    ),
    "key": (
        ["fit", "trainer.max_step=3"],
        "unknown key 'trainer.max_step'; did you mean trainer.max_steps",
    ),
    "key below a value": (
        ["fit", "--callbacks.progress.every_seconds", "1"],
        "unknown key 'callbacks.progress.every_seconds'; did you mean callbacks.",
    ),
    "key below a number": (
        ["fit", "optimizer.lr.rate=1"],
        "unknown key 'optimizer.lr.rate'; did you mean optimizer.lr",
    ),
    "checkpoint of a run": (
        ["validate", "checkpoint=runs/x/y"],
        "name the run by run=runs/x/y (its folder), and a checkpoint other than its last by ckpt_",
    ),
    "nothing to evaluate": (["evaluate"], "evaluate needs checkpoint=... or run=FOLDER; see"),
    "added key": (
        ["fit", "++evaluation.depth=[0]"],
        "unknown key 'evaluation.depth'; did you mean evaluation.depths",
    ),
    "key of a callback that is off": (
        ["fit", "callbacks.memory=null", "callbacks.memory.first_steps=1"],
        "callbacks.memory.first_steps=1: callbacks.memory is null (switched off) here",
    ),
    "key of no adapter": (
        ["fit", "model.adapter.r=4"],
        "leave it out, choose model/adapter=lora or switch it on with 'model.adapter={r: 4}'",
    ),
    "key of another logger": (
        ["fit", "logger.wandb.mode=online"],
        "leave it out, choose logger=wandb or switch it on",
    ),
    "misplaced key": (["fit", "max_steps=3"], "did you mean trainer.max_steps"),
    "type": (["fit", "trainer.max_steps=soon"], "trainer.max_steps: Value 'soon' of type 'str'"),
    "range": (["fit", "optimizer.lr=-1"], "optimizer.lr=-1.0: must be above 0"),
    "no assignment": (["fit", "mla_tiny"], "'mla_tiny' is neither key=value nor a flag"),
    "dimensions": (["fit", "model.qk_rope_head_dim=7"], "qk_rope_head_dim=7: must be even"),
    "positions": (
        ["fit", "model.max_position_embeddings=1000"],
        "the model has 1000 positions; lower it or raise",
    ),
    "evaluation length": (
        ["fit", "evaluation.lengths=[4194304]"],
        "4194304 tokens and an answer, but the model has 1048576",
    ),
    "options of another suite": (
        ["evaluate", "checkpoint=x", "suite=niah", "evaluation.lengths=[512]"],
        "suite=niah leaves out; options of another suite are suite.NAME.lengths",
    ),
    "a suite that an experiment sets up": (
        ["fit", "experiment=retrieval_tiny", "suite=graph"],
        "the suite niah is not chosen; add it: suite=[graph,niah]",
    ),
    "compiled pairs": (
        ["fit", "experiment=dpo_tiny", "model.compile=true"],
        "the rows of data=preference all have their own; set",
    ),
    "compiled conversations": (
        ["fit", "experiment=sft_tiny", "model.compile=true", "data.packing=false"],
        "or data.packing=true",
    ),
    "time": (["fit", "trainer.max_time=7min"], "write days:hours:minutes:seconds"),
    "no time": (["fit", "trainer.max_time=00:00:00:00"], "more than none of them, for example"),
    "no clock's time": (["fit", "trainer.max_time=00:99:99:99"], "write days:hours:minutes:sec"),
    "no tokenizer": (["fit", "tokenizer="], "tokenizer='': write bytes, or a folder"),
    "predict text": (
        ["predict", "data=text", "callbacks.context_length=null", "ckpt_path=last"],
        "predict: data=text marks no answers; take data=passkey, data=retrieval or data=preference",
    ),
    "attention": (["fit", "model.attention=triton"], "attention=triton: PyTorch sees no CUDA GPU"),
    "norm": (["fit", "model.norm=triton"], "norm=triton: PyTorch sees no CUDA GPU"),
    "backend": (
        ["fit", "model.rope=tritn"],
        "rope='tritn': did you mean triton? choose one of torch, triton",
    ),
    "evaluate backend": (
        ["evaluate", "checkpoint=x", "norm=trition"],
        "norm='trition': did you mean triton?",
    ),
    "evaluate dtype": (
        ["evaluate", "checkpoint=x", "dtype=bfloat"],
        "dtype='bfloat': did you mean bfloat16?",
    ),
    "accelerator": (
        ["fit", "trainer.accelerator=gpu"],
        "accelerator=gpu: PyTorch sees no CUDA GPU",
    ),
    "devices": (
        ["fit", "trainer.accelerator=cpu", "trainer.devices=0"],
        "trainer.devices=0: on the CPU choose auto or a number of processes from 1 to",
    ),
    "more processes than cores": (
        ["fit", "trainer.accelerator=cpu", "trainer.devices=100000"],
        f"from 1 to {os.cpu_count()}, the cores of this host",
    ),
    "a folder above": (["fit", "name=..", "run_id=.."], "name='..': a folder name"),
    "this folder": (["fit", "run_id=."], "run_id='.': a folder name"),
    "Hydra's settings": (["fit", "hydra.run.dir=x"], "Hydra's own settings have no effect here"),
    "a list of CPUs": (
        ["fit", "trainer.accelerator=cpu", "trainer.devices=[0,1]"],
        "trainer.devices=[0, 1]:",
    ),
    "clipping": (
        ["fit", "trainer.gradient_clip_val=-1"],
        "trainer.gradient_clip_val=-1.0: must be at least 0",
    ),
    "folder": (["fit", "output_dir=/proc/none"], "/proc/none: No such file or directory"),
    "a value of a sweep": (
        ["fit", "-m", "optimizer.lr=-1,-2"],
        "optimizer.lr=-1.0: must be above 0",
    ),
    "tokenizer": (
        ["fit", "tokenizer=./nowhere"],
        "write bytes, or a folder that holds a tokenizer",
    ),
    "run id": (["fit", "run_id=a/b"], "run_id='a/b': a folder name"),
    "data file": (["fit", "data=text", "data.train_files=[nowhere.jsonl]"], "nowhere.jsonl"),
    "no checkpoint": (["validate"], "ckpt_path: say which checkpoint"),
    "no last": (["fit", "ckpt_path=last"], "holds no such checkpoint"),
    "missing folder": (["fit", "ckpt_path=nowhere"], "no checkpoint folder nowhere"),
    "missing init": (["fit", "model.init_from=nowhere"], "no checkpoint folder nowhere"),
    "evaluate nothing": (["evaluate"], "evaluate needs checkpoint="),
    "evaluate nowhere": (["evaluate", "checkpoint=nowhere"], "no checkpoint folder nowhere"),
    "generate nothing": (["generate", "checkpoint=x"], "generate needs prompt="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(ic: Run, capsys: Capture, case: str, tmp_path: Path) -> None:
    args, message = BAD[case]
    assert ic(*args) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("ic: ")]
    assert message in line
    assert error.splitlines()[-1] == line
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_malformed_row_names_file_and_line(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n{"text": oops}\n')
    assert ic("fit", "data=text", "debug=default", f"data.train_files=[{rows}]") == 2
    error = capsys.readouterr().err
    assert str(rows) in error
    assert f"{rows}:2: not valid JSON" in error
