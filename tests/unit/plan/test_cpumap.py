"""What `host cpus` knows: seats, roles, who has which, and whether everybody is where he belongs."""

from __future__ import annotations

from dataclasses import replace

from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.facts import Facts, Process, RunningGuest, Thread
from kvmd.plan.cpumap import cpu_map
from kvmd.units import CpuSet
from tests.rig.hosts import topology

SHAPE = replace(
    topology(nodes=2, cores=2, threads=2, isolated=[2, 3], offline=[7]),
    nohz_full=CpuSet([3]),
    offline=CpuSet([7]),
    allowed=CpuSet(range(6)),
)


def running(name: str, *affinity: str, rest: str = "0-1") -> RunningGuest:
    return RunningGuest(name, "u", Process(7, 7), 1 << 30, affinity=affinity, others=(Thread(7, "qemu", rest),))


def test_every_cpu_has_its_roles_and_vcpus() -> None:
    guests = {"web": Guest.model_validate({"cpu": {"vcpus": 2, "placement": "dedicated"}, "memory": {"size": "1GiB"}})}
    facts = Facts(cpus=SHAPE, guests=(running("web", "2", "3"), running("gone", "4-5")))
    found = cpu_map(Desired(guests=guests), facts)
    assert found.housekeeping == "0-1,4-5"
    assert [(seat.id, seat.node, " ".join(seat.roles), " ".join(seat.vcpus)) for seat in found.cpus] == [
        (0, 0, "housekeeping", ""),
        (1, 0, "housekeeping", ""),
        (2, 0, "isolated", "web:0"),
        (3, 0, "isolated nohz_full", "web:1"),
        (4, 1, "housekeeping", ""),
        (5, 1, "housekeeping", ""),
        (6, 1, "forbidden", ""),
        (7, None, "offline", ""),
    ]
    gone, web = found.guests
    assert (web.placement, web.wanted_vcpus, web.wanted_others, web.placed) == ("dedicated", ("2", "3"), "0-1", True)
    assert (gone.placement, gone.wanted_vcpus, gone.placed) == ("", None, False)


def test_a_thread_that_strayed_is_told() -> None:
    guests = {"web": Guest.model_validate({"cpu": {"placement": "dedicated"}, "memory": {"size": "1GiB"}})}
    for guest in (running("web", "2", rest="0-7"), running("web", "0-7")):
        (web,) = cpu_map(Desired(guests=guests), Facts(cpus=SHAPE, guests=(guest,))).guests
        assert not web.placed
        assert web.threads == (("qemu", guest.others[0].cpus),)
