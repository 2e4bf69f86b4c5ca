"""continue a prompt with any model"""

from __future__ import annotations

from dataclasses import dataclass

from ic.inference.options import InferenceOptions


@dataclass
class Config(InferenceOptions):
    """The verb `generate`: continue a prompt.

    Attributes:
        prompt: text to continue; `-` reads standard input.
        chat: take the prompt as a user's message and let the model reply, in the tokenizer's chat
            template.
        system: with `chat`, a system message in front.
        max_new_tokens: tokens after which the continuation ends at the latest.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_p: share of the probability that the tokens to sample from hold together.
        seed: of the random draws of sampling.
        prefill_chunk_tokens: longest piece of the prompt that is processed at once.
    """

    prompt: str = "???"
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prefill_chunk_tokens: int = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.system is not None and not self.chat:
            raise ValueError(
                "system is the first message of a chat: set chat=true, or leave it out"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")


def run(config: Config) -> int:
    """Continue a prompt; the text appears as it is generated."""
    import sys
    from typing import Any

    import torch
    from transformers import GenerationConfig, TextStreamer

    from ic.datamodules.chat_templates import stop_tokens
    from ic.datamodules.conversations import apply_template, check_template
    from ic.inference.loading import load_source
    from ic.inference.model_facts import model_end_tokens

    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    if not prompt:
        raise ValueError("prompt is empty: give at least one character")
    loaded = load_source(config)
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    if config.chat:
        turns = [("system", config.system), ("user", prompt)]
        messages = [{"role": role, "content": text} for role, text in turns if text is not None]
        check_template(tokenizer, "chat=true")
        tokens, _ = apply_template(tokenizer, messages, "chat=true", prompt=True)
        ids = torch.tensor([tokens], device=model.device)
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    total = ids.shape[1] + config.max_new_tokens
    if total > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and max_new_tokens come to {total} tokens, but the model has "
            f"{model.config.max_position_embeddings} positions; shorten one of them"
        )
    torch.manual_seed(config.seed)
    greedy = config.temperature == 0
    own = stop_tokens(tokenizer) if config.chat else []
    if not own and tokenizer.eos_token_id is not None:
        own = [tokenizer.eos_token_id]
    ends = list(dict.fromkeys([*own, *model_end_tokens(model)]))
    chunk = config.prefill_chunk_tokens if ids.shape[1] > config.prefill_chunk_tokens else None
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else config.temperature,
            top_p=None if greedy else config.top_p,
            prefill_chunk_size=chunk,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
        ),
    )
    return 0
