"""Tables of `docs/deepseek_v3.md`: what MLA's cache takes, in DeepSeek's models and in ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ic.display.markdown import markdown
from ic.display.numbers import gib, tokens
from ic.evaluation.registry import build_suite
from ic.evaluation.statistics import pool
from ic.studies.tables.published import load

if TYPE_CHECKING:
    from ic.model import MLAConfig

_LENGTHS = (2**17, 2**20)


@dataclass(frozen=True)
class Shape:
    """What of a model its cache depends on.

    Attributes:
        source: where the numbers stand.
    """

    name: str
    source: str
    layers: int
    hidden: int
    heads: int
    query_rank: int | None
    latent: int
    rope: int
    head_dim: int

    @property
    def config(self) -> MLAConfig:
        """Keys without position and values are `head_dim` wide, as in all of these."""
        from ic.model import MLAConfig  # help needs no PyTorch

        return MLAConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            q_lora_rank=self.query_rank,
            kv_lora_rank=self.latent,
            qk_nope_head_dim=self.head_dim,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.head_dim,
        )


SHAPES = (
    Shape("DeepSeek-V2-Lite", "arXiv 2405.04434, B", 27, 2048, 16, None, 512, 64, 128),
    Shape("DeepSeek-V2", "arXiv 2405.04434, 3.1.2", 60, 5120, 128, 1536, 512, 64, 128),
    Shape("DeepSeek-V3", "arXiv 2412.19437, 4.2", 61, 7168, 128, 1536, 512, 64, 128),
    Shape("InfiniteContext-1B", "`mla_1b`", 16, 2048, 16, None, 192, 64, 128),
    Shape("`mla_small`", "`mla_small`", 6, 512, 8, None, 128, 32, 64),
    Shape("`mla_tiny`", "`mla_tiny`", 3, 128, 4, None, 64, 16, 32),
)


def compression_table() -> str:
    """Numbers that a cache holds for a token and layer, beside those of multi-head attention."""
    from ic.model.cost import cache_bytes_per_token

    heads = ["model", "given in", "layers", "heads", "latent + key", "MHA", "MLA"]
    heads += ["MHA / MLA", "groups of GQA", "bf16 per token"]
    lines = []
    for shape in SHAPES:
        config = shape.config
        whole, kept = 2 * shape.heads * shape.head_dim, config.latent_dim
        lines.append(
            [
                shape.name,
                shape.source,
                str(shape.layers),
                str(shape.heads),
                f"{shape.latent} + {shape.rope}",
                f"{whole:,}",
                f"{kept:,}",
                f"{whole / kept:.1f}",
                f"{kept / (2 * shape.head_dim):.2f}",
                f"{cache_bytes_per_token(config):,} B",
                *(gib(length * cache_bytes_per_token(config), 2) for length in _LENGTHS),
            ]
        )
    lengths = [f"of {tokens(length)} tokens" for length in _LENGTHS]
    return "\n".join(markdown([*heads, *lengths], lines, left=2))


# What the project's design asks of the 1B shape: bytes of cache per token, and of whole lengths.
_DESIGNED = {
    "MLA, bf16": ("8 KiB", {1024: "8.0 MiB", 2**17: "1.0 GiB", 2**20: "8 GiB"}),
    "MHA, bf16": ("128 KiB", {}),
    "GQA, 8 heads of 64, bf16": ("32 KiB", {}),
}
_ASKED_LENGTHS = (4096, 32768, 2**17, 2**20)


def design_table() -> str:
    """Row for row: a figure of the design, and what was measured of it."""
    file = "cache-memory.json"
    rows = {row["cache"]: row for row in load(file)["rows"]}
    lines = []
    for kind, (per_token, lengths) in _DESIGNED.items():
        measured = rows[kind]
        sizes = {int(n): size for n, size in measured["cache_bytes_by_tokens"].items()}
        shown = f"{measured['bytes_per_token'] / 1024:g} KiB"
        lines.append([f"cache per token, {kind}", per_token, shown, f"`{file}`"])
        for length, asked in lengths.items():
            size = sizes.get(length, length * measured["bytes_per_token"])
            how = "" if length in sizes else " (from the bytes per token)"
            unit = gib(size, 2) if size >= 2**30 else f"{size / 2**20:.1f} MiB"
            lines.append(
                [f"cache of {tokens(length)} tokens, {kind}", asked, unit + how, f"`{file}`"]
            )
    file = "infinitecontext_1b-passkey.json"
    counted = build_suite("passkey").counted(
        [row for row in load(file)["rows"] if row["what"] == "passkey"]
    )
    found = pool(counted, "length_tokens")
    lines += [
        [
            f"keys found at {tokens(n)} tokens",
            "a heatmap from 4k to 1M",
            str(found[n,]),
            f"`{file}`",
        ]
        for n in _ASKED_LENGTHS
        if (n,) in found
    ]
    return "\n".join(markdown(["figure", "design", "measured", "file"], lines, left=4))
