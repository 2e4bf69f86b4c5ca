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
        source: where the numbers stand: a report and its section, or a preset.
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
    Shape("DeepSeek-V2-Lite", "V2, B", 27, 2048, 16, None, 512, 64, 128),
    Shape("DeepSeek-V2", "V2, 3.1.2", 60, 5120, 128, 1536, 512, 64, 128),
    Shape("DeepSeek-V3", "V3, 4.2", 61, 7168, 128, 1536, 512, 64, 128),
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


_FOUND = "infinitecontext_1b-passkey.json"


def _keys_found() -> dict[int, str]:
    """Of InfiniteContext-1B, by length in tokens; both tasks and all depths pooled."""
    rows = [row for row in load(_FOUND)["rows"] if row["what"] == "passkey"]
    found = pool(build_suite("passkey").counted(rows), "length_tokens")
    return {n: str(found[n,]) for n in _ASKED_LENGTHS if (n,) in found}


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
    lines += [
        [f"keys found at {tokens(n)} tokens", "a heatmap from 4k to 1M", found, f"`{_FOUND}`"]
        for n, found in _keys_found().items()
    ]
    return "\n".join(markdown(["figure", "design", "measured", "file"], lines, left=4))


# DeepSeek 67B, which the abstract of V2 compares with: 95 layers, 8 groups of 128, 16 bits; V2's
# cache is served at 6 bits (3.2.3).
_NUMBERS_67B, _BITS_67B, _BITS_V2 = 95 * 2 * 8 * 128, 16, 6


def paper_table() -> str:
    """Row for row: what DeepSeek's reports say of caches and retrieval, and what ours is."""
    file = "cache-memory.json"
    measured = {row["cache"]: int(row["bytes_per_token"]) // 2 for row in load(file)["rows"]}
    shapes = {shape.name: shape for shape in SHAPES}
    lite, v2, ours = (shapes[n] for n in ("DeepSeek-V2-Lite", "DeepSeek-V2", "InfiniteContext-1B"))
    kept = {shape.name: shape.layers * shape.config.latent_dim for shape in SHAPES}
    whole = lite.layers * 2 * lite.heads * lite.head_dim
    less = 1 - kept[v2.name] * _BITS_V2 / (_NUMBERS_67B * _BITS_67B)
    in_heads = {shape.name: shape.config.latent_dim / shape.head_dim for shape in (v2, ours)}
    found = ", ".join(f"{tokens(n)}: {keys}" for n, keys in _keys_found().items() if n <= 2**17)
    measured_here, computed = f"measured, `{file}`", "computed from the shape"
    lines = [
        [
            "V2, table 1: MHA",
            "2 n<sub>h</sub> d<sub>h</sub> l",
            f"1B shape: {measured['MHA, bf16']:,}",
            measured_here,
        ],
        [
            "V2, table 1: GQA",
            "2 n<sub>g</sub> d<sub>h</sub> l",
            f"8 groups of 64, 16 layers: {measured['GQA, 8 heads of 64, bf16']:,}",
            measured_here,
        ],
        [
            "V2, table 1: MQA",
            "2 d<sub>h</sub> l",
            f"1B shape: {2 * ours.head_dim * ours.layers:,}",
            computed,
        ],
        [
            "V2, table 1: MLA",
            "(d<sub>c</sub> + d<sup>R</sup>) l",
            f"1B shape: {measured['MLA, bf16']:,}",
            measured_here,
        ],
        [
            "V2, table 1: MLA in heads",
            "4.5 d<sub>h</sub> l",
            f"V2 and V3 {in_heads[v2.name]:.1f}, 1B {in_heads[ours.name]:.1f} d<sub>h</sub> l",
            computed,
        ],
        [
            "V2, MLA against MHA: small MoE with MHA",
            "110.6K",
            f"V2-Lite's shape: {whole:,}",
            computed,
        ],
        [
            "V2, MLA against MHA: small MoE with MLA",
            "15.6K",
            f"V2-Lite's shape: {kept[lite.name]:,}",
            "allocated by a test",
        ],
        [
            "V2, MLA against MHA: large MoE with MHA",
            "860.2K",
            "-",
            "the report does not give its heads",
        ],
        [
            "V2, MLA against MHA: large MoE with MLA",
            "34.6K",
            f"V2's shape: {kept[v2.name]:,}",
            "allocated by a test",
        ],
        [
            "V2, abstract: less cache than DeepSeek 67B",
            "93.3 %",
            f"{less:.1%}".replace("%", " %"),
            "computed: 6 bits against 16",
        ],
        [
            "V2, MLA against MHA: BBH, MMLU, C-Eval, CMMLU",
            "MLA ahead in most",
            "-",
            "not measured: no model of ours has read enough text",
        ],
        [
            "V3, figure 8: needles in 2k to 128k tokens",
            "good at every length",
            f"1B, pass keys: {found}",
            f"measured, `{_FOUND}`",
        ],
    ]
    return "\n".join(markdown(["their row", "theirs", "ours", "how"], lines, left=4))
