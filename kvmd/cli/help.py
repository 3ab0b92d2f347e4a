"""What --help prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvmd.cli.arguments import Option, Parsed, Verb, parse, usage
from kvmd.cli.session import Session
from kvmd.cli.verbs import COMMON, GRAMMAR, GROUPS, VERBS

_EXIT_CODES = """\
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict or refused, 5 denied, 6 daemon unreachable,
7 timed out, 8 files have faults, 9 some of many failed, 10 plan: there is something to do."""


def show(session: Session, parsed: Parsed) -> int:
    """`help COMMAND`, as `COMMAND --help`."""
    words = parsed.words("COMMAND")
    session.out(page(parse(GRAMMAR, [*words, "--help"]).verb))
    return 0


def page(verb: Verb | None) -> str:
    """About one command, or about all."""
    return "\n".join(_about(verb) if verb else _overview()) + "\n"


def _overview() -> Iterator[str]:
    yield "kvmd-cli COMMAND: one Linux KVM host and its guests."
    for group, title in GROUPS.items():
        yield f"\n{title}:"
        yield from (f"  {verb.name:<18}{verb.summary}" for verb in VERBS.values() if verb.group == group)
    yield "\nOptions of every command, before or behind it:"
    yield from _options(COMMON)
    yield f"\n{_EXIT_CODES}"


def _about(verb: Verb) -> Iterator[str]:
    yield f"kvmd-cli {usage(verb)}\n"
    yield f"  {verb.summary}"
    if verb.options:
        yield ""
        yield from _options(verb.options)
    if verb.offline:
        yield "\nNeeds no daemon."
    yield "\nOptions of every command: kvmd-cli --help"


def _options(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        if option.hidden:
            continue
        names = f"{option.short}, {option.name}" if option.short else option.name
        left = f"{names} {option.metavar}" if option.metavar else names
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        yield f"  {left:<22}{option.about}{choices}"
