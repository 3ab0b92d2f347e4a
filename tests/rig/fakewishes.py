"""Desired states for the fake world: one that uses all of kvmd, and any number of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from random import Random
from typing import Any

from kvmd.config.desired import Desired
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.config.network import Network
from kvmd.units import CpuSet, Rate


def network(mode: str = "nat", third: int = 50, *, dhcp: bool = True, **about: Any) -> Network:
    """A network of that mode; 192.168.THIRD.1/24 unless it joins a bridge."""
    tables: dict[str, Any] = {"network": {"mode": mode, **about}}
    if mode != "bridge":
        ipv4: dict[str, Any] = {"address": IPv4Interface(f"192.168.{third}.1/24")}
        if dhcp:
            ipv4["dhcp"] = {"range": (IPv4Address(f"192.168.{third}.100"), IPv4Address(f"192.168.{third}.200"))}
        tables["ipv4"] = ipv4
    return Network.model_validate(tables)


def guest(
    size: str = "64MiB", *, nics: tuple[str, ...] = (), auto: bool | None = True, pages: bool = False, **tables: Any
) -> Guest:
    """A guest with a NIC on each of `nics`."""
    memory: dict[str, Any] = {"size": size} | ({"backing": "hugepages", "page_size": "2MiB"} if pages else {})
    start = {} if auto is None else {"auto": auto}
    nic = {f"n{number}": {"network": name} for number, name in enumerate(nics)}
    return Guest.model_validate({"memory": memory, "start": start, "nic": nic, **tables})


_MERGING = {"smart_scan": True, "use_zero_pages": True, "max_page_sharing": 512, "min_pages": 600, "max_pages": 20000}


def everything(*, merging: str = "kvmd") -> Desired:
    """A bit of all that kvmd prepares."""
    host = Host.model_validate(
        {
            "hugepages": {"2MiB": {"pages": "auto", "spare": "32MiB"}, "1GiB": {"pages": {"node1": 2}}},
            "ksm": {"mode": merging, "across_nodes": False} | _MERGING,
            "thp": {"enabled": "madvise", "defrag": "defer", "shmem_enabled": "advise", "khugepaged_defrag": False},
            "cpu": {"irq_affinity": "housekeeping", "kernel_args": "write"},
            "swap": {"swappiness": 10, "file": {"size": "8GiB"}, "zram": {"size": "1GiB"}},
            "modules": {"load": ["vhost_net"]},
            "sriov": {"eno2": {"vfs": 4}},
        }
    )
    return Desired(
        host=host,
        networks={
            "lab": network("isolated", 60),
            "lan": network(),
            "office": network("bridge", bridge="br0"),
            "spare": network("isolated", 70),
        },
        guests={
            "db": guest("1GiB", nics=("lab", "office"), limits={"tasks_max": 500}),
            "log": Guest.model_validate(
                {
                    "memory": {"size": "64MiB", "backing": "file", "path": "/mnt/pages", "page_size": "2MiB"},
                    "start": {"auto": False},
                }
            ),
            "web": guest(
                "128MiB",
                pages=True,
                cpu={"vcpus": 2, "placement": "dedicated"},
                nic={"n0": {"network": "lan", "guard": True, "rate_in": Rate.parse("10Mbit")}},
            ),
        },
    )


def some(chance: Random) -> Desired:
    """Any desired state of a small kind: up to three networks, up to four guests, every knob and pool of the host.

    Nothing is left as it is (no "keep", no pool or node unmentioned): what a state leaves open, the past decides.
    """
    networks = {
        name: network(
            chance.choice(["nat", "isolated"]),
            50 + number,
            dhcp=chance.random() < 0.5,
            mtu=chance.choice([1500, 9000]),
            stp=chance.random() < 0.3,
        )
        for number, name in enumerate(("dmz", "lab", "lan"))
        if chance.random() < 0.6
    }
    guests = {
        name: guest(
            chance.choice(["64MiB", "128MiB", "1GiB"]),
            nics=tuple(sorted(chance.sample(sorted(networks), chance.randrange(len(networks) + 1)))),
            auto=chance.random() < 0.7,
            pages=chance.random() < 0.5,
            cpu=chance.choice([{}, {"vcpus": 2}, {"placement": "dedicated"}]),
            limits=chance.choice([{}, {"tasks_max": 500}]),
        )
        for name in ("a", "b", "c", "d")
        if chance.random() < 0.6
    }
    # always as many as guests may hold on any node: what is in use stays, and then the past decides
    by_node = {"node0": 2100, "node1": 2200}
    small = [{"pages": "auto"}, {"pages": "auto", "spare": "16MiB"}, {"pages": 2100}, {"pages": by_node}]
    large = [{"pages": {"node0": 1, "node1": 0}}, {"pages": 2}, {"pages": "auto"}]
    host = {
        "hugepages": {"2MiB": chance.choice(small), "1GiB": chance.choice(large)},
        "ksm": {
            "mode": chance.choice(["off", "kernel", "kvmd"]),
            "across_nodes": chance.random() < 0.5,
            "max_cpu": chance.choice(["5%", "10%", "20%"]),
        },
        "cpu": {
            "irq_affinity": "housekeeping",
            "housekeeping": chance.choice(["auto", CpuSet([0]), CpuSet([4, 5])]),
            "kernel_args": "write",
        },
        "thp": {
            "enabled": chance.choice(["always", "madvise", "never"]),
            "defrag": chance.choice(["always", "defer", "never"]),
        },
        "swap": {"swappiness": chance.choice([1, 10, 60])}
        | chance.choice([{}, {"file": {"size": "1GiB"}}, {"file": {"size": "2GiB"}}])
        | chance.choice([{}, {"zram": {"size": "1GiB"}}]),
    }
    return Desired(host=Host.model_validate(host), networks=networks, guests=guests)


def shuffled(desired: Desired, chance: Random) -> Desired:
    """The same, its files read in another order."""

    def mixed(found: Mapping[str, Any]) -> dict[str, Any]:
        names = list(found)
        chance.shuffle(names)
        return {name: found[name] for name in names}

    return replace(desired, networks=mixed(desired.networks), guests=mixed(desired.guests))
