"""The command line as data: what a verb takes, and a parser for it. Pure, and cheap to import.

argparse costs 13 ms at every start; scripts and completion start the client often. Options may stand before the verb
(those of every verb only) or behind it, as `--name VALUE` or `--name=VALUE`; `--` ends them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvmd.errors import KvmdError

LONGEST_NAME = 47  # a guest's name is a unit's instance, a host name and part of a socket's path


class UsageError(KvmdError):
    """The command line itself is wrong."""

    slug = "usage"
    rpc_code = -32602
    exit_code = 2


class Option:
    """`--name`, with a value if it has a `metavar`. (Plain classes here: a NamedTuple costs a millisecond to make.)"""

    __slots__ = ("about", "choices", "hidden", "metavar", "name", "short")

    def __init__(
        self,
        name: str,
        about: str,
        metavar: str | None = None,
        *,
        short: str | None = None,
        choices: tuple[str, ...] = (),
        hidden: bool = False,
    ) -> None:
        self.name = name
        self.about = about
        self.metavar = metavar
        self.short = short
        self.choices = choices
        self.hidden = hidden


class Positional:
    """A word behind the verb. `of` says what: "guest" (one there is), "name" (of a new one), "key", "directory"."""

    __slots__ = ("many", "name", "of", "optional")

    def __init__(self, name: str, of: str = "", *, many: bool = False, optional: bool = False) -> None:
        self.name = name
        self.of = of
        self.many = many
        self.optional = optional


class Verb:
    """One command. `run` is "module:function"; `offline`: it needs no daemon and can be run as `kvmd VERB`."""

    __slots__ = ("changes", "group", "name", "offline", "options", "positionals", "run", "summary")

    def __init__(
        self,
        name: str,
        group: str,
        summary: str,
        run: str,
        positionals: tuple[Positional, ...] = (),
        options: tuple[Option, ...] = (),
        *,
        changes: bool = False,
        offline: bool = False,
    ) -> None:
        self.name = name
        self.group = group
        self.summary = summary
        self.run = run
        self.positionals = positionals
        self.options = options
        self.changes = changes
        self.offline = offline


class Parsed:
    """What was given. Names are those of the table: "--memory", "NAME"."""

    __slots__ = ("_switches", "_values", "_words", "verb")

    def __init__(
        self,
        verb: Verb | None,
        values: Mapping[str, str],
        switches: Iterable[str],
        words: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.verb = verb
        self._values = dict(values)
        self._switches = frozenset(switches)
        self._words = dict(words)

    def on(self, switch: str) -> bool:
        """Whether a switch was given."""
        return switch in self._switches

    def text(self, option: str) -> str | None:
        """An option's value, None when it was not given."""
        return self._values.get(option)

    def word(self, positional: str) -> str:
        """The one word of a positional; "" for an optional one that was left out."""
        return next(iter(self._words.get(positional, ())), "")

    def words(self, positional: str) -> tuple[str, ...]:
        """All words of a positional."""
        return self._words.get(positional, ())


class Grammar:
    """All that can be said: verbs by their full name ("host facts"), other names for them, names of what comes."""

    __slots__ = ("aliases", "common", "later", "verbs")

    def __init__(
        self,
        verbs: Mapping[str, Verb],
        aliases: Mapping[str, str],
        later: frozenset[str],
        common: tuple[Option, ...],
    ) -> None:
        self.verbs = verbs
        self.aliases = aliases
        self.later = later
        self.common = common


def parse(grammar: Grammar, argv: Sequence[str]) -> Parsed:
    """The verb and what it was given; `verb` is None where none is needed (--help, --version). Raises UsageError."""
    rest = list(argv)
    values: dict[str, str] = {}
    switches: set[str] = set()
    common = _by_name(grammar.common)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        _take_option(rest, common, values, switches, "kvmd-cli")
    if not rest or rest == ["--"]:
        if switches & {"--help", "--version"}:
            return Parsed(None, values, switches, {})
        raise UsageError("which command?", hint="kvmd-cli --help lists them")
    verb = _find_verb(grammar, rest)
    known = common | _by_name(verb.options)
    words: list[str] = []
    while rest:
        if rest[0] == "--":
            words += rest[1:]
            break
        if _is_option(rest[0]):
            _take_option(rest, known, values, switches, verb.name)
        else:
            words.append(rest.pop(0))
    given = {} if "--help" in switches else _deal_out(verb, words)
    return Parsed(verb, values, switches, given)


def usage(verb: Verb) -> str:
    """`logs NAME [--serial] [-f]`: the verb's line of usage."""
    parts = [verb.name]
    for positional in verb.positionals:
        word = f"{positional.name}..." if positional.many else positional.name
        parts.append(f"[{word}]" if positional.optional else word)
    for option in verb.options:
        if not option.hidden:
            parts.append(f"[{option.short or option.name}{f' {option.metavar}' if option.metavar else ''}]")
    return " ".join(parts)


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name probably meant, None if nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, sorted(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def _by_name(options: Iterable[Option]) -> dict[str, Option]:
    table = {option.name: option for option in options}
    table.update({option.short: option for option in options if option.short})
    return table


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not word[1].isdigit()


def _take_option(
    rest: list[str], known: Mapping[str, Option], values: dict[str, str], switches: set[str], where: str
) -> None:
    """Move one option, and its value if it has one, from the front of `rest` to where it belongs."""
    word = rest.pop(0)
    name, has_value, value = word.partition("=") if word.startswith("--") else (word, "", "")
    option = known.get(name)
    if option is None:
        near = nearest(name, (known_name for known_name, row in known.items() if not row.hidden), 0.75)
        raise UsageError(
            f"{where} has no option {name}",
            hint=f"did you mean {near}?" if near else "--help lists the options; a command's own stand behind it",
        )
    if option.metavar is None:
        if has_value:
            raise UsageError(f"{name} takes no value")
        switches.add(option.name)
        return
    if not has_value:
        if not rest:
            raise UsageError(f"{name} needs a value", hint=f"{name} {option.metavar}")
        value = rest.pop(0)
    if option.choices and value not in option.choices:
        raise UsageError(f'{name}: "{value}" is not one of {", ".join(option.choices)}')
    values[option.name] = value


def _find_verb(grammar: Grammar, rest: list[str]) -> Verb:
    """The verb at the front of `rest`, which loses its words."""
    first = rest.pop(0)
    if len(rest) and (verb := grammar.verbs.get(f"{first} {rest[0]}")):
        rest.pop(0)
        return verb
    if verb := grammar.verbs.get(grammar.aliases.get(first, first)):
        return verb
    second = next((word for word in rest if not word.startswith("-")), None)
    below = [name for name in grammar.verbs if name.startswith(f"{first} ")]
    if first in grammar.later or (second and f"{first} {second}" in grammar.later):
        name = first if first in grammar.later else f"{first} {second}"
        raise UsageError(f"{name} is not supported yet", hint="kvmd-cli --help lists what is")
    if below:
        raise UsageError(
            f"{first} {second}: no such command" if second else f"{first} what?", hint=f"one of: {', '.join(below)}"
        )
    near = nearest(first, [*grammar.verbs, *grammar.aliases])
    raise UsageError(
        f"{first}: no such command", hint=f"did you mean {near}?" if near else "kvmd-cli --help lists the commands"
    )


def _deal_out(verb: Verb, words: list[str]) -> dict[str, tuple[str, ...]]:
    """Words to positionals, in order; only the last one can be `many`."""
    given: dict[str, tuple[str, ...]] = {}
    left = list(words)
    for positional in verb.positionals:
        if not left and not positional.optional:
            raise UsageError(f"{verb.name}: {positional.name} is missing", hint=f"kvmd-cli {usage(verb)}")
        count = len(left) if positional.many else min(1, len(left))
        if positional.of in ("guest", "name"):
            _require_names(left[:count])
        given[positional.name] = tuple(left[:count])
        del left[:count]
    if left:
        raise UsageError(f'{verb.name}: what is "{left[0]}" for?', hint=f"kvmd-cli {usage(verb)}")
    return given


def _require_names(words: Iterable[str]) -> None:
    """What no guest can be called is told apart from what no guest is called."""
    for word in words:
        letters = word.isascii() and word.replace("-", "0").isalnum() and word == word.lower()
        if not letters or len(word) > LONGEST_NAME or word[0] == "-" or word[-1] == "-":
            raise UsageError(
                f'no guest can be called "{word}"',
                hint="1 to 47 of a-z, 0-9 and -, beginning and ending with a letter or digit",
            )
