"""The tables of sparse attention: passkeys that one model finds by dense and by sparse attention,
and how long its steps take on a GPU.
"""

from __future__ import annotations

from ic.display.markdown import markdown
from ic.evaluation.statistics import pool
from ic.studies.tables.published import load

# (what the model is, results of `evaluate` with indexer=dense and with indexer=sparse)
_MODELS = (("after `indexer_tiny`", "indexer_tiny"), ("after `sparse_tiny`", "sparse_tiny"))


def sparse_attention_table() -> str:
    """Right answers by model, attention and length, and the commit that measured them."""
    lines, lengths = [], list[int]()
    for name, file in _MODELS:
        for mode in ("dense", "sparse"):
            data = load(f"{file}-{mode}-passkey.json")
            rows = [row for row in data["rows"] if row["what"] == "passkey"]
            found = {key[0]: cell for key, cell in pool(rows, "length_tokens").items()}
            lengths = lengths or sorted(found)
            right = [f"{found[n].correct:g}/{found[n].n}" for n in lengths]
            lines.append([name, mode, *right, data["commit"][:9]])
    heads = [f"{length:,} tokens" for length in lengths]
    return "\n".join(
        markdown(["model", "attention", *heads, "commit"], lines, left=2, text=["commit"])
    )


def sparse_decode_table() -> str:
    """Microseconds of one layer's decode step by GPU, rows and context, dense and sparse."""
    columns = {
        "dense": ("dense", "ours"),
        "scores": ("bf16 keys, scores", "ours"),
        "scores, FP8 keys": ("fp8 keys, scores", "ours"),
        "choice": ("bf16 keys, choice", "ours"),
        "`torch.topk`": ("bf16 keys, choice", "PyTorch"),
        "whole": ("bf16 keys, whole", "ours"),
        "whole, FP8 keys": ("fp8 keys, whole", "ours"),
    }
    lines = []
    for gpu in ("H100", "H200"):
        data = load(f"kernels-sparse-decode-{gpu.lower()}.json")
        found = {(row["case"], row["by"]): row for row in data["rows"]}
        for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in data["rows"]):
            place = f"({batch}, {context >> 10}k)"
            rows = [found[f"{place} {name}", by] for name, by in columns.values()]
            times = [f"{row['median_us']:.1f}" if "n" in row else "refused" for row in rows]
            lines.append([gpu, f"{batch} x {context:,}", *times])
    return "\n".join(markdown(["GPU", "rows x context", *columns], lines, left=2))
