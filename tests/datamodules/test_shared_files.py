"""The same file as training and validation data is refused, however it is spelled."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ic.datamodules.file_contents import refuse_shared_files
from ic.datamodules.options import (
    DataOptions,
    PreferenceDataOptions,
    SFTDataOptions,
    TextDataOptions,
)
from ic.datamodules.preference import PreferenceDataModule
from ic.datamodules.sft import SFTDataModule
from ic.datamodules.text import TextDataModule

ROWS = {
    "text": '{"text": "a document that is long enough for a row"}\n',
    "sft": '{"prompt": "two and two?", "completion": "four"}\n',
    "preference": '{"prompt": "two and two?", "chosen": "four", "rejected": "five"}\n',
}


def respell(path: Path) -> str:
    return str(path.parent / "other" / ".." / path.name)


def symlink(path: Path) -> str:
    path.with_name("link.jsonl").symlink_to(path.name)
    return str(path.with_name("link.jsonl"))


def hard_link(path: Path) -> str:
    os.link(path, path.with_name("hard.jsonl"))
    return str(path.with_name("hard.jsonl"))


def copy(path: Path) -> str:
    return str(shutil.copy(path, path.with_name("copy.jsonl")))


def compressed_copy(path: Path) -> str:
    path.with_name("copy.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return str(path.with_name("copy.jsonl.gz"))


def module_of(kind: str, tokenizer: PreTrainedTokenizerBase, **files: list[str]):
    options: dict[str, DataOptions] = {
        "text": TextDataOptions(context_length=16, tokens_per_batch=16, **files),
        "sft": SFTDataOptions(context_length=64, tokens_per_batch=64, **files),
        "preference": PreferenceDataOptions(context_length=64, tokens_per_batch=128, **files),
    }
    modules = {"text": TextDataModule, "sft": SFTDataModule, "preference": PreferenceDataModule}
    return modules[kind](options[kind], tokenizer)


@pytest.mark.parametrize("spelled", [respell, symlink, hard_link, copy, compressed_copy])
@pytest.mark.parametrize("kind", ROWS)
def test_the_same_file_in_disguise(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, spelled: Callable[[Path], str]
) -> None:
    (tmp_path / "other").mkdir()
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS[kind] * 4)
    other = spelled(path)
    for split, stage in (("val", "fit"), ("test", "fit"), ("val", "validate"), ("test", "test")):
        module = module_of(kind, tokenizer, train_files=[str(path)], **{f"{split}_files": [other]})
        with pytest.raises(ValueError, match=rf"data\.{split}_files: \S+ is also in data\.train"):
            module.setup(stage)
    Path(tmp_path / "different.jsonl").write_text(ROWS[kind].replace("a", "o") * 4)
    different = [str(tmp_path / "different.jsonl")]
    module_of(kind, tokenizer, train_files=[str(path)], val_files=different).setup("fit")


def test_evaluation_without_the_training_files(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS["sft"])
    files = {"train_files": ["gone.jsonl"], "test_files": [str(tmp_path / "rows.jsonl")]}
    module_of("sft", tokenizer, **files).setup("test")


def test_a_saved_data_set_of_one_split_on_both_sides(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"prompt": ["a?", "b?"], "completion": ["c", "d"]})
    rows.save_to_disk(str(tmp_path / "rows"))
    both = [str(tmp_path / "rows")]
    with pytest.raises(ValueError, match=r"data\.val_files: .*arrow is also in data\.train_files"):
        module_of("sft", tokenizer, train_files=both, val_files=both).setup("fit")
    splits = rows.train_test_split(1, seed=0)
    splits["validation"] = splits.pop("test")
    splits.save_to_disk(str(tmp_path / "splits"))
    both = [str(tmp_path / "splits")]
    module_of("sft", tokenizer, train_files=both, val_files=both).setup("fit")


def test_files_that_begin_alike_are_not_the_same(tmp_path: Path) -> None:
    """Beyond what is compared first: 64 KiB."""
    names = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for name, last in zip(names, "xy", strict=True):
        name.write_text("word " * 40_000 + last)
    refuse_shared_files([str(names[0])], {"data.val_files": [str(names[1])]})
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(names[0].read_bytes()))
    with pytest.raises(ValueError, match=r"a\.txt\.xz is also in .*\(\S+/a\.txt is the same\)"):
        refuse_shared_files([str(names[0])], {"data.val_files": [str(tmp_path / "a.txt.xz")]})
