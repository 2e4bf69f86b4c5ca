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
  local word verb="${{COMP_WORDS[1]//-/_}}" pair="${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}"
  # `=` and `:` divide words for bash, not for us.
  word="${{COMP_LINE:0:COMP_POINT}}"; word="${{word##* }}"
  if [ "$COMP_CWORD" -le 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word")); return
  fi
  if [ "$COMP_CWORD" -gt 2 ] && [ -n "$(_ic_words "$pair")" ]; then verb="$pair"; fi
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
  local verb="${{words[2]//-/_}}"
  if (( CURRENT > 3 )); then
    case "${{words[2]}} ${{words[3]}}" in
      {pairs}) verb="${{words[2]}} ${{words[3]}}" ;;
    esac
  fi
  case "$verb" in
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
        words: each verb's words: `key=`, and `group=option` for what can be chosen. A verb of two
            words is offered behind the first of them.

    Raises:
        ValueError: a shell that is none of `SHELLS`.
    """
    check_choice("--completion", shell, SHELLS)
    verbs = [verb for verb in words if " " not in verb]
    pairs = [verb for verb in words if " " in verb]
    behind = {verb: [p.split()[1] for p in pairs if p.split()[0] == verb] for verb in verbs}
    known = {verb: " ".join([*behind.get(verb, ()), *some]) for verb, some in words.items()}
    shown = " ".join(verbs)
    if shell == "fish":
        cases = "\n".join(
            f'complete -c ic -n "{_seen_in_fish(verb)}" -a "{some}"' for verb, some in known.items()
        )
        return _FISH.format(verbs=shown, cases=cases)
    if shell == "zsh":
        cases = "\n".join(f'    "{verb}") words_of=({some}) ;;' for verb, some in known.items())
        either = "|".join(f'"{pair}"' for pair in pairs)
        return _ZSH.format(verbs=shown, cases=cases, pairs=either)
    cases = "\n".join(f'    "{verb}") echo "{some}" ;;' for verb, some in known.items())
    return _BASH.format(verbs=shown, cases=cases)


def _seen_in_fish(verb: str) -> str:
    return "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.split())
