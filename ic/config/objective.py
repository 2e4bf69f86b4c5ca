"""What a run trains for, and the LightningModule that does it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ic.checkpoint.hugging_face import CONFIG
from ic.checkpoint.source import find_source
from ic.training.options import (
    DistillationOptions,
    ObjectiveOptions,
    OptimizerOptions,
    PreferenceOptions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ic.inference.loading import Opened
    from ic.model.modeling_mla import MLAForCausalLM
    from ic.training.language_modeling import LanguageModelingModule


class ObjectiveConfig(ObjectiveOptions):
    def build(
        self, model: MLAForCausalLM, tokenizer: PreTrainedTokenizerBase, optimizer: OptimizerOptions
    ) -> LanguageModelingModule:
        from ic.training.language_modeling import LanguageModelingModule

        return LanguageModelingModule(model, tokenizer, optimizer, self)


class PreferenceConfig(PreferenceOptions):
    def build(
        self, model: MLAForCausalLM, tokenizer: PreTrainedTokenizerBase, optimizer: OptimizerOptions
    ) -> LanguageModelingModule:
        from ic.training.preference import PreferenceModule

        return PreferenceModule(model, tokenizer, optimizer, self)


# What two tokenizers must make the same of.
_SAMPLE = (
    "The cat's 3 kittens -- all 12,345 of them! -- sat in naïve Ångström's garden.\n\n"
    "\tdef f(x): return x**2 + 0.5  # 中文, русский, 😀\n"
)


class DistillationConfig(DistillationOptions):
    def check(self, context_length: int, vocab_size: int | None) -> None:
        """Refuse what names and the teacher's config.json tell, before PyTorch is loaded.

        Args:
            context_length: tokens of a row.
            vocab_size: the student's, if its configuration tells.

        Raises:
            ValueError: no such teacher, one of another vocabulary, or of fewer positions.
        """
        source = find_source(self.teacher)
        if source.is_gguf:
            return
        try:
            said = json.loads((source.path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"distillation.teacher={self.teacher}: {source.path / CONFIG} cannot be read: "
                f"{error}"
            ) from error
        said = said if isinstance(said, dict) else {}
        self._compare(
            said.get("vocab_size"), said.get("max_position_embeddings"), context_length, vocab_size
        )

    def open_teacher(
        self, tokenizer: PreTrainedTokenizerBase, context_length: int, vocab_size: int, on_gpu: bool
    ) -> Opened:
        """The teacher before its weights are loaded.

        Raises:
            ValueError: as `check`, or it has another tokenizer.
        """
        from ic.datamodules.tokenizers import tokenizer_fingerprint
        from ic.inference.loading import open_source
        from ic.inference.options import InferenceOptions

        dtype = "bfloat16" if on_gpu else "float32"
        opened = open_source(
            InferenceOptions(checkpoint=self.teacher, accelerator="cpu", dtype=dtype)
        )
        self._compare(opened.vocab_size, opened.positions, context_length, vocab_size)
        own = opened.tokenizer
        same = own.encode(_SAMPLE, add_special_tokens=False) == tokenizer.encode(
            _SAMPLE, add_special_tokens=False
        )
        if not same or tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"distillation.teacher={self.teacher} has another tokenizer than the run: a "
                "student learns the next token of its teacher's tokens; give a teacher of the same "
                "tokenizer, or tokenizer=FOLDER with the teacher's"
            )
        return opened

    def build(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerOptions,
        teacher: Opened,
    ) -> LanguageModelingModule:
        from ic.training.distillation import DistillationModule
        from ic.training.teacher import Teacher

        loaded = Teacher(
            teacher.load().model,
            f"distillation.teacher={self.teacher}",
            offload=self.offload,
            compile=self.compile,
        )
        return DistillationModule(model, tokenizer, optimizer, self, loaded)

    def _compare(
        self, vocabulary: Any, positions: Any, context_length: int, vocab_size: int | None
    ) -> None:
        if vocab_size is not None and isinstance(vocabulary, int) and vocabulary != vocab_size:
            raise ValueError(
                f"distillation.teacher={self.teacher} has a vocabulary of {vocabulary:,} tokens "
                f"and the student one of {vocab_size:,}: give the model that the student was made "
                "from"
            )
        if isinstance(positions, int) and positions < context_length:
            raise ValueError(
                f"data.context_length={context_length}: the teacher has {positions:,} positions; "
                "lower it, or choose another distillation.teacher"
            )
