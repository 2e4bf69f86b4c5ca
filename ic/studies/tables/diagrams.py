"""The documents' diagrams: SVG files that hold their own ground, and follow a light or dark theme.

Equal code gives equal text, so a test compares the files with what is drawn here. Nothing is loaded
to show them, on a site or on a page of the repository.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape

_STYLE = """
svg{--paper:#fff;--ink:#1b1f24;--soft:#57606a;--box:#eef3fa;--edge:#5b7fb0;--kept:#d9f2e6;--kept-edge:#2c8f63}
@media (prefers-color-scheme:dark){svg{--paper:#14171b;--ink:#e4e8ec;--soft:#a3adb8;--box:#20304a;
--edge:#7ea6de;--kept:#163a2b;--kept-edge:#55c493}}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;fill:var(--ink)}
.title{font-weight:600;font-size:15px}.soft{fill:var(--soft);font-size:12px}
.paper{fill:var(--paper)}.box{fill:var(--box);stroke:var(--edge)}
.kept{fill:var(--kept);stroke:var(--kept-edge)}.line{stroke:var(--soft);stroke-width:1.4;fill:none}
.head{fill:var(--soft)}
"""
_LINE = 17  # from one line of text to the next


class Drawing:
    """An SVG that grows by boxes, arrows and words; lengths are pixels.

    Args:
        title: what it shows, for who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker>',
            f'<rect class="paper" width="{width}" height="{height}" rx="10"/>',
        ]

    def words(self, x: int, y: int, text: str, kind: str = "", anchor: str = "middle") -> None:
        """A line of text whose base is at y."""
        self._parts.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(self, x: int, y: int, width: int, lines: str, kind: str = "box") -> None:
        """A box around lines of text, of which (x, y) is the middle of the upper edge."""
        texts = lines.split("\n")
        height = _LINE * len(texts) + 13
        self._parts.append(
            f'<rect class="{kind}" x="{x - width // 2}" y="{y}" width="{width}" '
            f'height="{height}" rx="6"/>'
        )
        for n, text in enumerate(texts):
            self.words(x, y + 19 + _LINE * n, text)

    def arrow(self, *points: tuple[int, int]) -> None:
        """A line through points, with a head at the last."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path class="line" d="M{path}" marker-end="url(#to)"/>')

    def svg(self) -> str:
        """The file."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def mla_forms() -> str:
    """Attention of one layer in both forms, as `ic/model/attention.py` computes it."""
    drawing = Drawing(
        860, 500, "MLA in two forms: expanded for training and prefill, absorbed for decoding"
    )
    for x, name, when in (
        (215, "Expanded", "training, long prefills"),
        (645, "Absorbed", "decoding over a cache"),
    ):
        drawing.words(x, 30, name, "title")
        drawing.words(x, 49, when, "soft")
        drawing.box(x, 64, 150, "hidden state h")
        drawing.box(x - 125, 130, 140, "latent c\nR numbers, cached", "kept")
        drawing.box(x + 10, 130, 112, "rotated key\nP, cached", "kept")
        drawing.box(x + 138, 130, 126, "queries\nH x (N + P)")
        for to in (x - 125, x + 10, x + 138):
            drawing.arrow((x, 94), (to, 129))
    x = 215
    drawing.box(x - 105, 214, 180, "kv_b_proj: keys H x N\nand values H x V")
    drawing.arrow((x - 125, 177), (x - 125, 213))
    drawing.box(x + 20, 300, 320, "softmax of query . [key; rotated key]\nper head, over S tokens")
    drawing.arrow((x - 60, 261), (x - 60, 299))
    drawing.arrow((x + 20, 177), (x + 20, 299))
    drawing.arrow((x + 138, 177), (x + 138, 299))
    drawing.box(x + 20, 380, 320, "weighted sum of values: H x V")
    drawing.arrow((x + 20, 347), (x + 20, 379))
    drawing.arrow((x - 170, 261), (x - 170, 395), (x - 141, 395))
    drawing.box(x + 20, 440, 320, "o_proj")
    drawing.arrow((x + 20, 410), (x + 20, 439))
    x = 645
    drawing.box(x + 110, 214, 180, "key half of kv_b_proj:\nqueries become H x R")
    drawing.arrow((x + 138, 177), (x + 138, 213))
    drawing.box(
        x + 20, 300, 320, "softmax of query . [latent; rotated key]\nall heads, the same S rows"
    )
    drawing.arrow((x + 138, 261), (x + 138, 299))
    drawing.arrow((x - 90, 177), (x - 90, 299))
    drawing.arrow((x + 8, 177), (x + 8, 299))
    drawing.box(x + 20, 380, 320, "weighted sum of latents: H x R")
    drawing.arrow((x + 20, 347), (x + 20, 379))
    drawing.arrow((x - 170, 177), (x - 170, 395), (x - 141, 395))
    drawing.box(x + 20, 440, 320, "value half of kv_b_proj: H x V; then o_proj")
    drawing.arrow((x + 20, 410), (x + 20, 439))
    drawing.words(
        430,
        490,
        "H heads, N + P a key's dimensions, V a value's, R of the latent, S tokens",
        "soft",
    )
    return drawing.svg()


def batch_way() -> str:
    """The way of a batch through one optimizer step."""
    drawing = Drawing(860, 470, "The way of a batch: from the datamodule to the checkpoint")
    left, right = 215, 640
    drawing.words(left, 30, "from the batch to its loss", "soft")
    drawing.box(
        left, 42, 350, "datamodule: a batch is a function of\nseed, step, rank and context length"
    )
    drawing.arrow((left, 89), (left, 111))
    drawing.box(
        left,
        112,
        350,
        "Batch: input_ids, labels, position_ids (B, T);\n"
        "document_ids, answer_mask where there are any",
        "kept",
    )
    drawing.arrow((left, 159), (left, 191))
    drawing.box(
        left,
        192,
        350,
        "AttentionContext, once for all layers:\nrotations, masks, documents, row lengths",
    )
    drawing.arrow((left, 239), (left, 271))
    drawing.box(
        left, 272, 350, "embedding, then each layer:\nnorm, MLA (expanded), norm, gated MLP"
    )
    drawing.arrow((left, 319), (left, 351))
    drawing.box(
        left,
        352,
        350,
        "head and loss in chunks: labels are shifted;\nanswers count whole, all tokens a tenth",
    )
    drawing.arrow((left + 176, 375), (left + 212, 375), (left + 212, 64), (right - 176, 64))
    drawing.words(right, 30, "from the loss to the weights", "soft")
    drawing.box(right, 42, 350, "backward, divided by the targets of all\nranks and micro-batches")
    drawing.arrow((right, 89), (right, 111))
    drawing.box(
        right, 112, 350, "guardrails: a bad step is skipped,\nthree in a row are rolled back"
    )
    drawing.arrow((right, 159), (right, 191))
    drawing.box(right, 192, 350, "optimizer: Muon for matrices,\nAdamW for the rest")
    drawing.arrow((right, 239), (right, 271))
    drawing.box(right, 272, 350, "callbacks: log, context length, validation,\nevaluation, samples")
    drawing.arrow((right, 319), (right, 351))
    drawing.box(
        right, 352, 350, "checkpoint: weights, optimizer, generators,\nthe data's next step", "kept"
    )
    drawing.arrow((right, 399), (right, 440), (18, 440), (18, 64), (left - 176, 64))
    drawing.words(430, 432, "the next step", "soft")
    return drawing.svg()


def context_parallel() -> str:
    """One sequence on two ranks: chunks, the gathered latents, a layer."""
    drawing = Drawing(
        860, 430, "Context parallelism on two ranks: latents move, keys and values do not"
    )
    drawing.words(430, 28, "one sequence of S tokens in four chunks", "title")
    for n, rank in enumerate((0, 1, 1, 0)):
        drawing.box(145 + 190 * n, 42, 180, f"chunk {n}", "kept" if rank else "box")
    for rank, x, kind in ((0, 230, "box"), (1, 630, "kept")):
        mine = "0 and 3" if rank == 0 else "1 and 2"
        drawing.box(x, 116, 330, f"rank {rank} holds chunks {mine}", kind)
        drawing.box(
            x, 176, 330, "its latents and rotated keys:\nR + P numbers per token and layer", kind
        )
        drawing.arrow((x, 146), (x, 175))
        drawing.arrow((x, 223), (x, 255))
        drawing.box(
            x,
            310,
            330,
            "expands them to keys and values itself;\nits chunks attend to what is before them",
            kind,
        )
        drawing.arrow((x, 286), (x, 309))
        drawing.box(x, 376, 330, "its part of the loss; gradients of latents go back", kind)
        drawing.arrow((x, 357), (x, 375))
    for n, x in ((0, 190), (3, 270), (1, 590), (2, 670)):
        drawing.arrow((145 + 190 * n, 72), (x, 115))
    drawing.box(430, 256, 760, "all-gather of latents: every rank has all S of them, in order")
    return drawing.svg()


DIAGRAMS: dict[str, Callable[[], str]] = {
    "mla-forms.svg": mla_forms,
    "batch-way.svg": batch_way,
    "context-parallel.svg": context_parallel,
}
