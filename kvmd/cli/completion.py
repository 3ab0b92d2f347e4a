"""`completion`: bash's completion script, made from the table of commands. Guests are read from guests.d."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.cli.arguments import Parsed, UsageError, Verb
from kvmd.cli.session import Session
from kvmd.cli.verbs import COMMON, VERBS

_HEAD = """\
# bash completion for kvmd-cli. Made by `kvmd-cli completion`; do not edit.
_kvmd_cli() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} config=/etc/kvmd verb="" words="" i word
    local guests="" networks=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
        --config-dir) config=${COMP_WORDS[i+1]} ;;
        -*) ;;
        *)
            case ${COMP_WORDS[i-1]} in
            @VALUED@) ;;
            *)
                case $verb in
                "") verb=$word ;;
                @GROUPS@) verb+=" $word" ;;
                esac
                ;;
            esac
            ;;
        esac
    done
    case $prev in
    --config-dir|--state-dir|--run-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
    --image|--cdrom|--kernel|--initrd|--socket) COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    for word in "$config"/guests.d/*.toml; do
        [ -e "$word" ] && word=${word##*/} && guests+=" ${word%.toml}"
    done
    for word in "$config"/networks.d/*.toml; do
        [ -e "$word" ] && word=${word##*/} && networks+=" ${word%.toml}"
    done
    case $verb in
"""
_TAIL = """\
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _kvmd_cli kvmd-cli
"""


def completion(session: Session, parsed: Parsed) -> int:
    """Print the script: `source <(kvmd-cli completion)`."""
    shell = parsed.word("SHELL") or "bash"
    if shell != "bash":
        raise UsageError(f"completion: no script for {shell}", hint="there is one for bash")
    session.out(script())
    return 0


def script() -> str:
    """The whole script."""
    valued = "|".join(sorted(_valued()))
    groups = "|".join(dict.fromkeys(name.split()[0] for name in VERBS if " " in name))
    return _HEAD.replace("@VALUED@", valued).replace("@GROUPS@", groups) + "".join(_cases()) + _TAIL


def _valued() -> set[str]:
    """Every option that takes a value: the word behind it is no command."""
    rows = [*COMMON, *(option for verb in VERBS.values() for option in verb.options)]
    return {name for row in rows if row.metavar for name in (row.name, row.short) if name}


def _cases() -> Iterator[str]:
    first = dict.fromkeys(name.split()[0] for name in VERBS)
    yield f'    "") words="{" ".join([*first, *(option.name for option in COMMON)])}" ;;\n'
    for group in dict.fromkeys(name.split()[0] for name in VERBS if " " in name):
        yield f'    {group}) words="{" ".join(name.split()[1] for name in VERBS if name.startswith(group + " "))}" ;;\n'
    for verb in VERBS.values():
        yield f'    "{verb.name}") words="{_words(verb)}" ;;\n'


def _words(verb: Verb) -> str:
    options = [option.name for option in (*verb.options, *COMMON) if not option.hidden]
    kinds = {positional.of for positional in verb.positionals}
    names = [word for kind, word in (("guest", "$guests"), ("network", "$networks")) if kind in kinds]
    return " ".join([*names, *options])
