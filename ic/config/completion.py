"""Completion for shells: a script that holds every word, so that a Tab waits for no Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ic.errors import check_choice

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# bash completion for ic; made by: python -m ic --completion bash
_ic_words() {{
  case "$1" in
{cases}
  esac
}}
_ic() {{
  local word verb="${{COMP_WORDS[1]//-/_}}"
  # `=` and `:` divide words for bash, not for us.
  word="${{COMP_LINE:0:COMP_POINT}}"; word="${{word##* }}"
  if [ "$COMP_CWORD" -le 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word")); return
  fi
  COMPREPLY=($(compgen -W "$(_ic_words "$verb")" -- "$word"))
  if [ ${{#COMPREPLY[@]}} -eq 0 ] && [[ "$word" == *=* ]]; then
    COMPREPLY=($(compgen -f -- "${{word#*=}}"))
  elif [[ "$word" == *=* ]]; then
    COMPREPLY=("${{COMPREPLY[@]#*=}}")
  fi
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
}}
complete -F _ic ic
"""
_ZSH = """\
#compdef ic
# zsh completion for ic; made by: python -m ic --completion zsh
_ic() {{
  local -a words_of
  if (( CURRENT == 2 )); then
    compadd -- {verbs}
    return
  fi
  case "${{words[2]//-/_}}" in
{cases}
  esac
  compadd -S '' -- $words_of || {{ compset -P '*=' && _files }}
}}
compdef _ic ic
"""
_FISH = """\
# fish completion for ic; made by: python -m ic --completion fish
complete -c ic -n __fish_use_subcommand -f -a "{verbs}"
{cases}
"""


def completion_script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """The script that makes a shell complete `ic`.

    Args:
        words: each verb's words: `key=`, and `group=option` for what can be chosen.

    Raises:
        ValueError: a shell that is none of `SHELLS`.
    """
    check_choice("--completion", shell, SHELLS)
    verbs = " ".join(words)
    if shell == "fish":
        cases = "\n".join(
            f'complete -c ic -n "__fish_seen_subcommand_from {verb}" -a "{" ".join(known)}"'
            for verb, known in words.items()
        )
        return _FISH.format(verbs=verbs, cases=cases)
    if shell == "zsh":
        cases = "\n".join(
            f"    {verb}) words_of=({' '.join(known)}) ;;" for verb, known in words.items()
        )
        return _ZSH.format(verbs=verbs, cases=cases)
    cases = "\n".join(f'    {verb}) echo "{" ".join(known)}" ;;' for verb, known in words.items())
    return _BASH.format(verbs=verbs, cases=cases)
