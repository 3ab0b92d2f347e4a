"""What tests/data/network/config becomes: the one nft table and each network's dnsmasq configuration.

`texts()` gives every golden file's name and content; `scripts/regen` writes them, the unit tests compare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvmd.actions import ReplaceRuleset, StartDnsmasq
from kvmd.config.desired import Desired
from kvmd.config.load import load
from kvmd.facts import Facts, Link
from kvmd.plan.network import FORWARDING, FORWARDING6, plan_network
from kvmd.plan.nfttable import PORTS
from kvmd.plan.ports import plan_ports

DATA = Path(__file__).resolve().parent.parent / "data/network"
MACS: Mapping[tuple[str, str], str] = {
    ("web", "lan"): "02:00:00:00:00:01",
    ("web", "second"): "02:00:00:00:00:02",
    ("web", "dmz"): "02:00:00:00:00:03",
    ("db", "lab"): "02:00:00:00:00:04",
    ("db", "campus"): "02:00:00:00:00:05",
}
UUIDS = {name: f"6f0d2c6e-9a0f-4a57-8a0c-{name:0>12}" for name in ("web", "db")}
BR0 = Link("br0", 2, kind="bridge", mac="fc:00:00:00:00:01", up=True, addresses=("203.0.113.7/24",))
FRESH = Facts(
    links=(Link("lo", 1, up=True, addresses=("127.0.0.1/8",)), BR0), knobs={FORWARDING: "0", FORWARDING6: "0"}
)


def desired() -> Desired:
    """The configuration, which must be without fault."""
    loaded = load(DATA / "config")
    assert not loaded.faults, [str(fault) for fault in loaded.faults]
    return loaded.desired


def texts() -> dict[str, str]:
    """Golden file below tests/data/network -> content."""
    wanted = desired()
    actions, problems = plan_network(wanted.networks, wanted.guests, MACS, FRESH)
    assert not problems, problems
    found = {}
    ports, _ = plan_ports(wanted.networks, wanted.guests, MACS, UUIDS, FRESH)
    for action in (*actions, *ports):
        match action:
            case ReplaceRuleset(table=table):
                found["ports.nft" if table == PORTS else "ruleset.nft"] = action.text
            case StartDnsmasq():
                found[f"{action.network}.dnsmasq.conf"] = action.config
            case _:
                pass
    return found
