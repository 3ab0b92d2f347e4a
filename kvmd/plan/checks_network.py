"""Judgements about the network: programs, forwarding, who drops packets, who holds the ports, what was left. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmd.config.network import Network, bridge_name, is_forwarding, makes_bridge
from kvmd.plan.checks_memory import apply_fix
from kvmd.plan.dnsmasq import wants_dnsmasq
from kvmd.plan.firewall import Finding as Drop
from kvmd.plan.firewall import bridge_nf as bridge_nf_knobs
from kvmd.plan.firewall import foreign_forward_drops
from kvmd.plan.hostreport import Finding, HostReport, Listener, Unseen, fail, ok, skip, warn
from kvmd.plan.links import ALIAS
from kvmd.plan.network import FORWARDING, FORWARDING6

_DNS, _DHCP = PORTS = (53, 67)
_NO_NETWORK = "no network is declared"
_NONE_FORWARDS = "no network of mode nat or routed"


def _of_mode(report: HostReport, *modes: str) -> Mapping[str, Network]:
    return {name: net for name, net in sorted(report.desired.networks.items()) if net.network.mode in modes}


def nft(report: HostReport) -> Iterator[Finding]:
    """nft(8) writes kvmd's one table."""
    wanting = {name: net for name, net in sorted(report.desired.networks.items()) if makes_bridge(net)}
    if "nft" in report.programs:
        yield ok("nft is installed")
    elif wanting:
        yield fail(f"nft is not installed; network {next(iter(wanting))} needs it", "apt-get install nftables")
    else:
        yield skip("nft is not installed, and no network needs it")


def dnsmasq(report: HostReport) -> Iterator[Finding]:
    """dnsmasq(8) serves addresses and names."""
    wanting = [name for name, network in sorted(report.desired.networks.items()) if wants_dnsmasq(network)]
    if "dnsmasq" in report.programs:
        yield ok("dnsmasq is installed")
    elif wanting:
        yield fail(f"dnsmasq is not installed; network {wanting[0]} wants DHCP or DNS", "apt-get install dnsmasq-base")
    else:
        yield skip("dnsmasq is not installed, and no network needs it")


def forwarding(report: HostReport) -> Iterator[Finding]:
    """NAT and routed networks need the host to route (Documentation/networking/ip-sysctl.rst)."""
    wanting = _forwarding(report)
    knobs = (
        (FORWARDING, "net.ipv4.ip_forward", [name for name, net in wanting.items() if net.ipv4]),
        (FORWARDING6, "net.ipv6.conf.all.forwarding", [name for name, net in wanting.items() if net.ipv6]),
    )
    if not wanting:
        yield skip(_NONE_FORWARDS)
    for path, name, networks in knobs:
        value = report.facts.knobs.get(path)
        if networks and value == "1":
            yield ok(f"{name} is 1")
        elif networks and path == FORWARDING6 and report.facts.ra_uplinks:
            link = report.facts.ra_uplinks[0]
            message = f"{name} stays {value}: this host learns its own IPv6 way out from routers on {link}"
            yield fail(message, f"sysctl -w net.ipv6.conf.{link.replace('.', '/')}.accept_ra=2 && kvmd-cli apply")
        elif networks:
            message = f"{name} is {value or 'unreadable'}; network {networks[0]} needs 1"
            # Before kvmd runs that is the usual state; while it runs, somebody took it back.
            judged = fail if report.listening else warn
            yield judged(message, apply_fix(report))


def _forwarding(report: HostReport) -> Mapping[str, Network]:
    return {name: net for name, net in sorted(report.desired.networks.items()) if is_forwarding(net)}


def firewall(report: HostReport) -> Iterator[Finding]:
    """Nobody else drops what NAT and routed networks forward."""
    wanting = _forwarding(report)
    if not wanting:
        yield skip(_NONE_FORWARDS)
        return
    clean = True
    for name, network in wanting.items():
        drops = _drops(report, bridge_name(name, network))
        if isinstance(drops, Unseen):
            yield skip(f"the host's rules cannot be read: {drops.reason}")
            return
        for drop in drops:
            clean = False
            by = f" ({drop.owner})" if drop.owner else ""
            yield fail(f"network {name}: {drop.where}{by} has {drop.what}: guests cannot get out", drop.hint)
    if "filter" in report.legacy_tables:
        clean = False
        bridge = bridge_name(*next(iter(wanting.items())))
        yield warn(
            "the old iptables has a filter table, which nft does not show: it may drop what guests send",
            f"iptables-legacy -I FORWARD -i {bridge} -j ACCEPT; iptables-legacy -I FORWARD -o {bridge} -j ACCEPT",
        )
    if clean:
        yield ok(f"nothing drops what networks {', '.join(wanting)} forward")


def bridge_nf(report: HostReport) -> Iterator[Finding]:
    """Frames between guests do not pass the host's IP firewall (br_netfilter)."""
    findings = bridge_nf_knobs(report.facts.knobs)
    if not report.desired.networks:
        yield skip(_NO_NETWORK)
        return
    bridges = {bridge_name(name, network) for name, network in report.desired.networks.items()}
    dropped = sorted(bridge for bridge in bridges if isinstance(found := _drops(report, bridge), tuple) and found)
    for finding in findings:
        knob = finding.where.rpartition("/")[2]
        fix = f"sysctl -w net.bridge.{knob}=0 (unless Kubernetes or another program here needs it)"
        if dropped:
            yield fail(f"{finding.where} is 1 and a rule drops: guests on {dropped[0]} lose frames", fix)
        else:
            yield warn(f"{finding.where} is 1: frames between guests pass iptables", fix)
    if not findings:
        yield ok("frames between guests of one bridge pass no IP firewall")


def _drops(report: HostReport, bridge: str) -> tuple[Drop, ...] | Unseen:
    """What drops the bridge's packets; Unseen where the listing could not be had or read."""
    if isinstance(report.ruleset, Unseen):
        return report.ruleset
    try:
        return foreign_forward_drops(report.ruleset, bridge)
    except ValueError as error:
        return Unseen(str(error))


def bridges(report: HostReport) -> Iterator[Finding]:
    """Networks of mode bridge join one that the distribution makes."""
    wanting = {name: net for name, net in _of_mode(report, "bridge").items() if net.uplink is None}
    there = {link.name: link for link in report.links}
    clean = True
    for name, network in wanting.items():
        bridge = bridge_name(name, network)
        link = there.get(bridge)
        if link is None:
            clean = False
            yield fail(
                f'network {name}: there is no bridge "{bridge}" to join',
                _make_bridge(report, bridge, vlans=network.network.vlan_filtering),
            )
        elif link.kind != "bridge":
            clean = False
            fix = f'bridge = "br0" in [network] of networks.d/{name}.toml'
            yield fail(f'network {name}: "{bridge}" is an interface, and no bridge', fix)
    if not wanting:
        yield skip("no network of mode bridge")
    elif clean:
        yield ok(f"{', '.join(sorted(_names(wanting)))}: there to join")


def _names(networks: Mapping[str, Network]) -> set[str]:
    return {bridge_name(name, network) for name, network in networks.items()}


def _make_bridge(report: HostReport, bridge: str, *, vlans: bool) -> str:
    """The lines for whatever this host sets its network up with, on the interface of its default route.

    `vlans`: the bridge has to filter. netplan has no key for that: the line to type stands behind its own.
    """
    nic = report.uplink or "enp1s0"
    filtering = "[Bridge]\\nVLANFiltering=yes\\n" if vlans else ""  # systemd.netdev(5)
    aware = f"  up ip link set {bridge} type bridge vlan_filtering 1\\n" if vlans else ""
    match report.network_setup:
        case "NetworkManager":
            return (
                f"nmcli connection add type bridge ifname {bridge} con-name {bridge}"
                f"{' bridge.vlan-filtering yes' if vlans else ''} && nmcli connection add"
                f" type ethernet ifname {nic} con-name {bridge}-{nic} master {bridge} && nmcli connection up {bridge}"
            )
        case "netplan":
            return (
                f"printf 'network:\\n  version: 2\\n  ethernets: {{{nic}: {{dhcp4: false}}}}\\n"
                f"  bridges: {{{bridge}: {{interfaces: [{nic}], dhcp4: true}}}}\\n'"
                " > /etc/netplan/60-kvmd.yaml && netplan try"
                + (f" && ip link set {bridge} type bridge vlan_filtering 1" if vlans else "")
            )
        case "networkd":
            return (
                f"printf '[NetDev]\\nName={bridge}\\nKind=bridge\\n{filtering}'"
                f" > /etc/systemd/network/10-{bridge}.netdev"
                f" && printf '[Match]\\nName={nic}\\n[Network]\\nBridge={bridge}\\n' >"
                f" /etc/systemd/network/10-{nic}.network && printf '[Match]\\nName={bridge}\\n[Network]\\nDHCP=yes\\n'"
                f" > /etc/systemd/network/20-{bridge}.network && networkctl reload"
            )
        case "ifupdown":
            return (
                f"apt-get install bridge-utils && printf 'auto {bridge}\\niface {bridge} inet dhcp\\n"
                f"  bridge_ports {nic}\\n{aware}' > /etc/network/interfaces.d/{bridge} && ifup {bridge}"
                f" (take {nic} out of /etc/network/interfaces)"
            )


def dns_ports(report: HostReport) -> Iterator[Finding]:
    """Nobody else holds the ports kvmd's DHCP and DNS servers want."""
    serving = {name: net for name, net in sorted(report.desired.networks.items()) if wants_dnsmasq(net)}
    names = {name: net for name, net in serving.items() if net.dns.enabled}
    leases = {name: net for name, net in serving.items() if net.ipv4 and net.ipv4.dhcp}
    addresses = {str(net.ipv4.address.ip) for net in names.values() if net.ipv4}
    clean = True
    for listener in _once(report.listeners):
        shown = f"{listener.program or 'a program'} (pid {listener.pid})" if listener.pid else "another program"
        if listener.port == _DNS and names and (listener.is_wildcard or listener.address in addresses):
            clean = False
            yield fail(
                f"{shown} holds {listener.address}:53, which network {next(iter(names))} needs for names",
                _free_dns(listener, report),
            )
        elif listener.port == _DHCP and listener.protocol == "udp" and leases and listener.is_wildcard:
            clean = False
            yield warn(
                f"{shown} listens on {listener.address}:67: two DHCP servers may answer on {next(iter(leases))}",
                _leave_alone(listener, report),
            )
    if not serving:
        yield skip("no network has DHCP or DNS")
    elif clean:
        yield ok("ports 53 and 67 are free for the networks' servers")


def _once(listeners: tuple[Listener, ...]) -> list[Listener]:
    """Foreign listeners, one for each program and port: most hold UDP and TCP, IPv4 and IPv6."""
    seen: dict[tuple[int, str | None], Listener] = {}
    for listener in sorted(listeners, key=lambda each: (each.port, each.protocol == "tcp", each.address)):
        if not listener.ours:
            seen.setdefault((listener.port, listener.program), listener)
    return list(seen.values())


def _free_dns(listener: Listener, report: HostReport) -> str:
    match listener.program:
        case "systemd-resolve":  # the kernel keeps 15 bytes of a name
            return "remove DNSStubListenerExtra= from /etc/systemd/resolved.conf && systemctl restart systemd-resolved"
        case "named":
            return "listen-on { 127.0.0.1; }; in the options of /etc/bind/named.conf.options; systemctl restart named"
        case "unbound":
            return "interface: 127.0.0.1 in the server part of /etc/unbound/unbound.conf; systemctl restart unbound"
        case _:
            return _leave_alone(listener, report)


def _leave_alone(listener: Listener, report: HostReport) -> str:
    if listener.program == "dnsmasq":
        lines = "".join(f"except-interface={name}\\n" for name in sorted(_names(report.desired.networks)))
        return f"printf 'bind-dynamic\\n{lines}' > /etc/dnsmasq.d/kvmd.conf && systemctl restart dnsmasq"
    if listener.program is None:
        return f"ss -lnp 'sport = :{listener.port}'"
    return f"systemctl disable --now {listener.program}"


def leftover_links(report: HostReport) -> Iterator[Finding]:
    """Interfaces with kvmd's mark whose guest or network is gone."""
    alive = {guest.name for guest in report.facts.guests}
    clean = True
    for link in report.links:
        if not link.alias.startswith(ALIAS):
            continue
        parts = link.alias.split(":")
        if link.kind == "tap" and len(parts) == 4 and parts[2] not in alive:
            clean = False
            yield warn(
                f"TAP {link.name} is left of guest {parts[2]}, which does not run", f"ip link delete {link.name}"
            )
        elif link.kind == "bridge" and len(parts) == 2 and parts[1] not in report.desired.networks:
            clean = False
            fix = "kvmd-cli apply" if report.listening else f"ip link delete {link.name}"
            yield warn(f"bridge {link.name} is left of network {parts[1]}, which is not declared", fix)
    if clean:
        yield ok("no TAP or bridge is left of a guest or network that is gone")
