"""Names of licences."""

from __future__ import annotations

# Those that the hub knows; any other is `other` there, under its own name.
# https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()  # noqa: SIM905 (a list would take a line for each)
)
_LONGEST = 100


def hub_licence(name: str | None) -> str:
    """What the hub calls a licence."""
    if name is None:
        return "unknown"
    spelt = name.lower().replace(" ", "-")
    return spelt if spelt in HUB_LICENCES else "other"


def check_licence(licence: str | None) -> None:
    """Raises ValueError for an option `licence` that cannot be the name of one."""
    if licence is not None and (
        not licence.strip() or len(licence.splitlines()) > 1 or len(licence) > _LONGEST
    ):
        raise ValueError(
            f"licence={licence!r}: give the name of a licence in one line, such as apache-2.0, or "
            "null to take the source's"
        )
