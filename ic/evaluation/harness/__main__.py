"""lm-evaluation-harness's own command line, where `--model ic` is known.

The harness finds models by names that were registered before its command line begins, and offers no
entry point for other packages to do so. So this is `lm_eval` with one import before it:

    python -m ic.evaluation.harness --model ic --model_args checkpoint=runs/mla_tiny/default \\
        --tasks arc_easy --limit 100
"""

from __future__ import annotations

import sys

from ic.errors import UsageError, one_line


def main() -> None:
    """Run the harness's command line; what we refuse is one line and exit code 2."""
    from ic.evaluation.harness.tasks import check_installed

    try:
        check_installed()
        from lm_eval.__main__ import cli_evaluate

        import ic.evaluation.harness.registered  # noqa: F401

        cli_evaluate()
    except UsageError as error:
        print(f"ic: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
