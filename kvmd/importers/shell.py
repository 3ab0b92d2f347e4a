"""A shell script, or a command line somebody pasted, as the words QEMU would get. Pure.

Not a shell: quoting, comments, line continuations and plain variables are understood; what only running the script
would tell (`$(…)`, arithmetic, loops) is kept as text and told. Nothing is ever executed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvmd.errors import ConfigInvalid

_ASSIGNMENT = re.compile(r"(?:export\s+|readonly\s+|local\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)(?::?-([^}]*))?\}|([A-Za-z_][A-Za-z0-9_]*))")
_EMULATOR = re.compile(r"(?:.*/)?(?:qemu-system-[a-z0-9_]+|qemu-kvm|kvm|qemu)(?:-spice)?(?:\.exe)?")
_ENDS = frozenset({"&", "&&", "||", ";", "|", ")", "(", ";;"})
_REDIRECTIONS = re.compile(r"\d*(?:>>|>&|>|<)&?")
LONGEST_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One call of QEMU: its program, its arguments, what stood before it, and what only a shell could know."""

    program: str
    arguments: tuple[str, ...]
    prefix: tuple[str, ...] = ()  # sudo, taskset -c 2,3, numactl …
    open_variables: tuple[str, ...] = ()  # named and not set in this text
    redirected: tuple[str, ...] = ()


@dataclass(slots=True)
class _Scan:
    variables: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """Variables of this text in place; others stay as they are written and are remembered."""

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[3]
            if name in self.variables:
                return self.variables[name]
            if found[2] is not None:
                return found[2]
            if name not in self.unknown:
                self.unknown.append(name)
            return found[0]

        return _VARIABLE.sub(value, text)


def command_lines(text: str) -> tuple[CommandLine, ...]:
    """Every call of QEMU in the text, in order. ConfigInvalid when there is none, or the quoting does not end."""
    if len(text) > LONGEST_TEXT:
        raise ConfigInvalid(f"{len(text)} characters are more than a script has", hint=f"at most {LONGEST_TEXT}")
    scan, found = _Scan(), []
    for words in _statements(text):
        call = _call(words, scan)
        if call:
            found.append(call)
    if not found:
        raise ConfigInvalid(
            "there is no call of qemu-system-…, qemu-kvm or kvm in it",
            hint="give the script, the line, or `-- qemu-system-x86_64 …`",
        )
    return tuple(found)


def of_argv(argv: Sequence[str]) -> CommandLine:
    """Words that are words already: /proc/PID/cmdline, or what stands behind `--`. ConfigInvalid when it is no QEMU."""
    for at, word in enumerate(argv):
        if _EMULATOR.fullmatch(word):
            return CommandLine(word, tuple(argv[at + 1 :]), tuple(argv[:at]))
    raise ConfigInvalid(
        f"{argv[0] if argv else 'nothing'} is no QEMU", hint="begin with qemu-system-x86_64 or qemu-kvm"
    )


def _statements(text: str) -> Iterator[list[str]]:
    """Words of each line, continuation lines joined; operators are words of their own."""
    joined = re.sub(r"\\\r?\n[ \t]*", " ", text)
    rest: list[str] = []
    for line in joined.splitlines():
        rest.append(line)
        try:
            words = _words("\n".join(rest))
        except ValueError:  # a quote that goes on in the next line
            if len(rest) > 200:
                break
            continue
        rest = []
        if words:
            yield words
    if rest:
        raise ConfigInvalid(f"a quote does not end: {rest[0][:60].strip()}")


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def _call(words: list[str], scan: _Scan) -> CommandLine | None:
    """The call of QEMU in one statement; assignments before it or instead of it are remembered."""
    prefix: list[str] = []
    for at, word in enumerate(words):
        assigned = _ASSIGNMENT.fullmatch(word)
        if assigned and not any(_EMULATOR.fullmatch(before) for before in prefix):
            scan.variables[assigned[1]] = scan.expand(assigned[2])
            continue
        expanded = scan.expand(word)
        if _EMULATOR.fullmatch(expanded):
            scan.unknown.clear()
            arguments, redirected = _arguments(words[at + 1 :], scan)
            return CommandLine(expanded, arguments, tuple(prefix), tuple(scan.unknown), redirected)
        if word in _ENDS:
            prefix.clear()
        elif word not in ("export", "readonly", "local"):
            prefix.append(expanded)
    return None


def _arguments(words: Sequence[str], scan: _Scan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments up to the end of the command, and redirections, which are the shell's."""
    found: list[str] = []
    redirected: list[str] = []
    pending = iter(words)
    for word in pending:
        if word in _ENDS:
            break
        if _REDIRECTIONS.fullmatch(word):
            redirected.append(f"{word}{next(pending, '')}")
            continue
        expanded = scan.expand(word)
        # A variable that holds several options, as scripts collect them: OPTS="-m 512 -smp 2".
        found += shlex.split(expanded) if _is_whole_variable(word) and " " in expanded else [expanded]
    return tuple(found), tuple(redirected)


def _is_whole_variable(word: str) -> bool:
    return _VARIABLE.fullmatch(word) is not None
