"""The command line: every verb, where options may stand, and what is said about what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given as example
from hypothesis import strategies as st

from kvmd.cli.arguments import UsageError, Verb, parse, usage
from kvmd.cli.verbs import ALIASES, COMMON, GRAMMAR, GROUPS, LATER, VERBS
from kvmd.config.scalars import guest_name

# "What is fixed" of the architecture: these names exist, now or later, and mean nothing else.
FIXED = """
init create edit set check plan apply reconcile status health explain
list show start stop kill reboot reset restart suspend resume save enable disable hold unhold wait delete clone rename
release why logs events console monitor screenshot ip stats top graph argv disk nic image backup restore export
import.qemu import.running import.libvirt import.proxmox import.bundle
host.facts host.cpus host.hugepages host.drain host.undrain host.release capabilities doctor
network.list network.show network.leases
tune.status tune.advise tune.explain tune.record tune.replay tune.simulate job db version completion
"""


def given(verb: Verb) -> list[str]:
    """The least a verb needs."""
    return [*verb.name.split(), *(f"x{n}" for n, p in enumerate(verb.positionals) if not p.optional)]


@pytest.mark.parametrize("name", [name.replace(".", " ") for name in FIXED.split()])
def test_every_fixed_name_is_a_command_or_one_of_later(name: str) -> None:
    assert (name in VERBS) != (name in LATER)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
class TestEachVerb:
    def test_its_least_form_is_understood(self, verb: Verb) -> None:
        parsed = parse(GRAMMAR, given(verb))
        assert parsed.verb is verb
        for number, positional in enumerate(verb.positionals):
            assert parsed.word(positional.name) == ("" if positional.optional else f"x{number}")

    def test_every_option_is_understood(self, verb: Verb) -> None:
        for option in (*verb.options, *COMMON):
            for spelling in filter(None, (option.name, option.short)):
                if option.metavar is None:
                    assert parse(GRAMMAR, [*given(verb), spelling]).on(option.name)
                    continue
                value = option.choices[0] if option.choices else "-x 1"
                assert parse(GRAMMAR, [*given(verb), spelling, value]).text(option.name) == value
                if spelling.startswith("--"):
                    assert parse(GRAMMAR, [*given(verb), f"{spelling}={value}"]).text(option.name) == value

    def test_common_options_may_stand_first(self, verb: Verb) -> None:
        parsed = parse(GRAMMAR, ["--json", "--run-dir", "/r", *given(verb), "--timeout=3"])
        assert (parsed.on("--json"), parsed.text("--run-dir"), parsed.text("--timeout")) == (True, "/r", "3")

    def test_what_is_missing_or_too_much_is_named(self, verb: Verb) -> None:
        if any(not positional.optional for positional in verb.positionals):
            with pytest.raises(UsageError, match="is missing"):
                parse(GRAMMAR, verb.name.split())
        if not any(positional.many for positional in verb.positionals):
            with pytest.raises(UsageError, match="what is"):
                parse(GRAMMAR, [*verb.name.split(), *(f"x{n}" for n in range(len(verb.positionals) + 1))])
        with pytest.raises(UsageError, match="has no option --frob"):
            parse(GRAMMAR, [*given(verb), "--frob"])

    def test_the_table_itself(self, verb: Verb) -> None:
        assert verb.group in GROUPS
        assert verb.summary
        assert usage(verb).startswith(verb.name)
        module, _, function = verb.run.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
        names = [n for option in (*verb.options, *COMMON) for n in (option.name, option.short) if n]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("word", sorted(ALIASES))
def test_virsh_words(word: str) -> None:
    verb = VERBS[ALIASES[word]]
    assert parse(GRAMMAR, [word, *given(verb)[len(verb.name.split()) :]]).verb is verb
    assert word not in VERBS
    assert word not in LATER


@pytest.mark.parametrize("name", sorted(LATER))
def test_names_of_later_say_so(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not supported yet") as error:
        parse(GRAMMAR, [*name.split(), "--whatever", "web"])
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("line", "words", "hint"),
    [
        ("strat web", "strat: no such command", "did you mean start?"),
        ("host", "host what?", "host facts"),
        ("host fact", "host fact: no such command", "host facts"),
        ("", "which command", "--help"),
        ("--json", "which command", "--help"),
        ("list --jsn", "has no option --jsn", "did you mean --json?"),
        ("--force stop web", "has no option --force", "--help"),
        ("list --socket", "--socket needs a value", "--socket PATH"),
        ("list --json=yes", "takes no value", ""),
        ("create web --accel xen", "is not one of kvm, tcg, auto", ""),
        ("--", "which command", "--help"),
    ],
)
def test_what_is_wrong_is_said(line: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(GRAMMAR, line.split())
    assert words in error.value.message
    assert hint in (error.value.hint or "")


def test_words_after_two_dashes_are_no_options() -> None:
    parsed = parse(GRAMMAR, ["set", "web", "guest.description", "--", "--yes"])
    assert parsed.word("VALUE") == "--yes"
    assert not parsed.on("--yes")


def test_a_negative_number_is_a_value() -> None:
    assert parse(GRAMMAR, ["set", "web", "k", "-1"]).word("VALUE") == "-1"


def test_many_words() -> None:
    assert parse(GRAMMAR, ["start", "a", "--yes", "b"]).words("NAME") == ("a", "b")


@example(st.text(max_size=4) | st.text("az09-", min_size=45, max_size=49) | st.text("aZ0-", max_size=4))
def test_names_are_judged_as_in_files(name: str) -> None:
    try:
        guest_name(name)
    except ValueError:
        with pytest.raises(UsageError, match="no guest can be called"):
            parse(GRAMMAR, ["show", "--", name])
    else:
        assert parse(GRAMMAR, ["show", name]).word("NAME") == name
