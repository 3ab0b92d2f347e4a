"""Words the kernel's command line should have: computed from the declared guests, compared, kept in one drop-in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Disruption, WriteKernelArgs
from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.errors import NotSupported, Refused
from kvmd.facts import BootLine, CpuTopology, Facts, Iommu, Process, RunningGuest
from kvmd.plan.kernelargs import DROP_IN, asked_for, kernel_arguments, parse_drop_in, plan_kernel_args
from kvmd.plan.release import plan_release
from kvmd.units import CpuSet
from tests.rig.hosts import topology

EIGHT = topology(cores=4, threads=2)  # housekeeping 0-1


def guest(**cpu: Any) -> Guest:
    return Guest.model_validate({"cpu": {"placement": "dedicated", **cpu}, "memory": {"size": "1GiB"}})


def desired(host: dict[str, Any] | None = None, **guests: Guest) -> Desired:
    return Desired(host=Host.model_validate(host or {}), guests=guests)


def booted(shape: CpuTopology, cmdline: str, drop_in: str | None = None) -> Facts:
    """The host after a boot with these words."""
    words = dict(word.split("=", 1) for word in cmdline.split() if "=" in word)
    isolated = CpuSet.parse(words.get("isolcpus", "").removeprefix("managed_irq,domain,"))
    nohz = CpuSet.parse(words.get("nohz_full", ""))
    shape = replace(shape, isolated=CpuSet(isolated & shape.online), nohz_full=CpuSet(nohz & shape.online))
    return Facts(cpus=shape, boot=BootLine(cmdline, drop_in, "grub"))


def test_nobody_asks_and_nothing_is_wanted() -> None:
    for wants in (desired(), desired(a=guest(placement="shared")), desired(a=guest(isolated="avoid"))):
        found = kernel_arguments(wants, booted(EIGHT, "quiet"))
        assert (found.words, found.drop_in, found.problems) == ((), "", ())


def test_dedicated_guests_want_their_cpus_isolated() -> None:
    found = kernel_arguments(
        desired(a=guest(vcpus=2), b=guest(isolated="require")), booted(EIGHT, "root=/dev/sda1 quiet")
    )
    assert [(word.wanted, word.present, word.enough) for word in found.words] == [
        ("isolcpus=managed_irq,domain,2-4", None, False),
        ("nohz_full=2-4", None, False),
        ("rcu_nocbs=2-4", None, False),
        ("irqaffinity=0-1,5-7", None, False),
    ]
    assert found.words[0].why == "a, b have CPUs of their own: 2-4"
    assert found.drop_in.splitlines()[-1] == (
        'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX isolcpus=managed_irq,domain,2-4 nohz_full=2-4 rcu_nocbs=2-4 '
        'irqaffinity=0-1,5-7"'
    )
    assert all(line.startswith("#") for line in found.drop_in.splitlines()[:-1])
    assert found.missing == found.words


def test_the_siblings_of_an_isolating_guest_and_housekeeping_interrupts() -> None:
    host = {"cpu": {"irq_affinity": "housekeeping"}}
    found = kernel_arguments(desired(host, a=guest(vcpus=2, smt="isolate")), booted(EIGHT, ""))
    assert [word.wanted for word in found.words] == [
        "isolcpus=managed_irq,domain,2-5",
        "nohz_full=2-5",
        "rcu_nocbs=2-5",
        "irqaffinity=0-1",
    ]


def test_what_serves_stays_as_it_is() -> None:
    """An administrator isolated more by hand: his list is the list for all."""
    by_hand = booted(EIGHT, "isolcpus=4-7 irqaffinity=0-3")
    found = kernel_arguments(desired(a=guest(vcpus=2)), by_hand)
    assert [(word.wanted, word.enough) for word in found.words] == [
        ("isolcpus=managed_irq,domain,4-7", True),
        ("nohz_full=4-7", False),
        ("rcu_nocbs=4-7", False),
        ("irqaffinity=0-3", True),
    ]
    assert parse_drop_in(found.drop_in) == ("nohz_full=4-7", "rcu_nocbs=4-7")


def test_a_list_from_elsewhere_that_is_too_short_is_told_and_nothing_half_is_written() -> None:
    found = kernel_arguments(desired(a=guest(vcpus=4)), booted(EIGHT, "isolcpus=4-5"))
    (problem,) = found.problems
    wanted = "isolcpus=managed_irq,domain,2-5 is wanted (a has CPUs of its own: 2-5)"
    assert f"{wanted}, and isolcpus=4-5 comes from elsewhere" in problem.message
    assert parse_drop_in(found.drop_in) == ("irqaffinity=0-1,6-7",)


@pytest.mark.parametrize(
    ("pool", "cmdline", "wanted", "present", "enough"),
    [
        ({"pages": 4}, "", "hugepagesz=1G hugepages=4", None, False),
        ({"pages": 4}, "hugepagesz=1G hugepages=4", "hugepagesz=1G hugepages=4", "hugepagesz=1G hugepages=4", True),
        ({"pages": 4}, "hugepagesz=1G hugepages=2", "hugepagesz=1G hugepages=4", "hugepagesz=1G hugepages=2", False),
        ({"pages": 4}, "hugepages=512", "hugepagesz=1G hugepages=4", None, False),
        ({"pages": 4}, "default_hugepagesz=1G hugepages=0:2,1:2", "hugepagesz=1G hugepages=4",
         "hugepagesz=1G hugepages=0:2,1:2", True),
        ({"pages": {"node1": 3, "node0": 1}}, "", "hugepagesz=1G hugepages=0:1,1:3", None, False),
        ({"pages": "auto", "spare": "1GiB"}, "", "hugepagesz=1G hugepages=4", None, False),
    ],
)  # fmt: skip
def test_pages_of_1_gib_are_best_had_at_boot(
    pool: dict[str, Any], cmdline: str, wanted: str, present: str | None, enough: bool
) -> None:
    huge = {"memory": {"size": "3GiB", "backing": "hugepages", "page_size": "1GiB"}}
    wants = desired({"hugepages": {"1GiB": pool, "2MiB": {"pages": 9}}}, big=Guest.model_validate(huge))
    (word,) = kernel_arguments(wants, booted(EIGHT, cmdline)).words
    assert (word.wanted, word.present, word.enough) == (wanted, present, enough)


def test_passthrough_wants_an_iommu() -> None:
    given = Guest.model_validate({"memory": {"size": "1GiB"}, "hostdev": {"gpu": {"pci": "0000:3b:00.0"}}})
    for iommu, cmdline, enough in (
        (Iommu(0, "intel"), "", False),
        (Iommu(9, "intel"), "", True),
        (Iommu(0, "intel"), "intel_iommu=on,sm_on", True),
        (Iommu(0, "intel"), "intel_iommu=off", False),
    ):
        facts = replace(booted(EIGHT, cmdline), iommu=iommu)
        (word,) = kernel_arguments(desired(a=given), facts).words
        assert (word.wanted, word.enough) == ("intel_iommu=on", enough)
    assert kernel_arguments(desired(a=given), replace(booted(EIGHT, ""), iommu=Iommu(0, "amd"))).words == ()


# ---- the drop-in ----------------------------------------------------------------------------------------------------


def test_only_write_writes_and_then_waits_for_the_reboot() -> None:
    facts = booted(EIGHT, "quiet")
    assert plan_kernel_args(desired(a=guest()), facts) == ((), ())
    wants = desired({"cpu": {"kernel_args": "write"}}, a=guest())
    (action,), problems = plan_kernel_args(wants, facts)
    assert isinstance(action, WriteKernelArgs)
    assert (action.disruption, problems) == (Disruption.HOST, ())
    assert action.line() == f"+ {DROP_IN}: isolcpus=managed_irq,domain,2 nohz_full=2 rcu_nocbs=2 irqaffinity=0-1,3-7"
    written = replace(facts, boot=replace(facts.boot, drop_in=action.new))
    actions, (problem,) = plan_kernel_args(wants, written)
    assert not actions
    assert "wait for a reboot" in problem.message
    assert problem.hint == "update-grub, then reboot the host"
    rebooted = booted(EIGHT, "quiet " + " ".join(parse_drop_in(action.new)), action.new)
    assert plan_kernel_args(wants, rebooted) == ((), ())
    (gone,), _ = plan_kernel_args(desired({"cpu": {"kernel_args": "write"}}), rebooted)
    assert gone.line() == f"- {DROP_IN}"


def test_a_loader_without_a_place_for_it_is_told_how() -> None:
    facts = booted(EIGHT, "")
    hints: dict[Any, str] = {
        "grubby": "grubby --update-kernel=ALL --args='isolcpus=",
        "kernel-install": "/etc/kernel/cmdline",
        "": "boot loader",
    }
    for loader, words in hints.items():
        elsewhere = replace(facts, boot=replace(facts.boot, loader=loader))
        actions, (problem,) = plan_kernel_args(desired({"cpu": {"kernel_args": "write"}}, a=guest()), elsewhere)
        assert not actions
        assert words in (problem.hint or "")


def test_what_a_person_asks_for() -> None:
    facts, wants = booted(EIGHT, ""), desired(a=guest())
    found = kernel_arguments(wants, facts)
    action = asked_for(found, facts.boot, wants.host, "root asked", remove=False)
    assert action is not None
    there = replace(facts.boot, drop_in=action.new)
    assert asked_for(found, there, wants.host, "root asked", remove=False) is None
    gone = asked_for(found, there, wants.host, "root asked", remove=True)
    assert gone is not None
    assert gone.new == ""
    assert asked_for(found, facts.boot, wants.host, "root asked", remove=True) is None
    with pytest.raises(NotSupported):
        asked_for(found, replace(facts.boot, loader=""), wants.host, "root asked", remove=False)
    with pytest.raises(Refused, match="would write it again"):
        asked_for(found, there, Host.model_validate({"cpu": {"kernel_args": "write"}}), "root asked", remove=True)
    clash = booted(EIGHT, "isolcpus=7")
    with pytest.raises(Refused, match="comes from elsewhere"):
        asked_for(kernel_arguments(desired(a=guest(vcpus=2)), clash), clash.boot, wants.host, "root", remove=False)


@pytest.mark.parametrize(
    ("now", "original", "new", "line", "kept"),
    [
        ("ours", "", "ours", f"- {DROP_IN}", None),
        ("ours", "before", "ours", f"~ {DROP_IN}: ", None),
        (None, "", "ours", None, None),
        ("edited", "", "ours", None, f"{DROP_IN}: someone changed it after kvmd wrote it"),
    ],
)
def test_release_takes_back_what_this_boot_wrote(
    now: str | None, original: str, new: str, line: str | None, kept: str | None
) -> None:
    (undo,) = plan_release([("kernel-args", DROP_IN, original, new)], Facts(boot=BootLine(drop_in=now)))
    assert (undo.action.line() if undo.action else None, undo.kept) == (line, kept)


# ---- properties -----------------------------------------------------------------------------------------------------


@given(
    st.builds(topology, nodes=st.integers(1, 2), cores=st.integers(2, 4), threads=st.integers(1, 2)),
    st.dictionaries(
        st.sampled_from("abc"),
        st.builds(
            guest,
            vcpus=st.integers(1, 3),
            isolated=st.sampled_from(["prefer", "require", "avoid"]),
            smt=st.sampled_from(["prefer", "require", "isolate"]),
        ),
    ),
)
def test_a_boot_with_what_is_wanted_is_enough(shape: CpuTopology, guests: dict[str, Guest]) -> None:
    """Words, drop-in, reboot: then nothing is missing, and the CPUs isolated are never the housekeeping's."""
    wants = Desired(host=Host.model_validate({"cpu": {"kernel_args": "write"}}), guests=guests)
    facts = booted(shape, "")
    for _ in range(3):
        found = kernel_arguments(wants, facts)
        facts = booted(shape, " ".join(parse_drop_in(found.drop_in)), found.drop_in or None)
    again = kernel_arguments(wants, facts)
    assert again.missing == ()
    assert again.drop_in == found.drop_in
    assert plan_kernel_args(wants, facts) == ((), ())
    assert shape.online - facts.cpus.isolated, "somebody must run the host"


@given(st.dictionaries(st.sampled_from("abc"), st.builds(guest, vcpus=st.integers(1, 2)), min_size=1))
def test_running_guests_keep_their_cpus_in_it(guests: dict[str, Guest]) -> None:
    running = tuple(
        RunningGuest(name, "u", Process(1, 1), 1 << 30, affinity=("7", "6")[: each.cpu.vcpus])
        for name, each in list(guests.items())[:1]
    )
    facts = replace(booted(EIGHT, ""), guests=running)
    word = kernel_arguments(Desired(guests=guests), facts).words[0]
    assert CpuSet.parse(word.wanted.rpartition("domain,")[2]) >= CpuSet(int(cpu) for cpu in running[0].affinity)
