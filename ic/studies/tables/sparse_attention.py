"""The table of sparse attention: passkeys that one model finds by dense and by sparse attention."""

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
