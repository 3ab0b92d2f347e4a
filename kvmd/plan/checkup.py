"""All of doctor's checks: one table, in the order they are shown. Pure; docs/doctor.md explains each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvmd.plan import checks_devices, checks_machine, checks_memory, checks_network, checks_storage, checks_system
from kvmd.plan.hostreport import Check, Finding, HostReport

Judge = Callable[[HostReport], Iterator[Finding]]

CHECKS: Mapping[str, Judge] = {
    "kernel": checks_machine.kernel,
    "kvm": checks_machine.kvm,
    "kvm-device": checks_machine.kvm_device,
    "nested": checks_machine.nested,
    "vhost-net": checks_machine.vhost_net,
    "tun": checks_machine.tun,
    "modules": checks_devices.modules,
    "iommu": checks_devices.iommu,
    "passthrough": checks_devices.passthrough,
    "qemu": checks_machine.qemu,
    "qemu-sandbox": checks_machine.qemu_sandbox,
    "isolcpus": checks_machine.isolcpus,
    "pins": checks_machine.pins,
    "psi": checks_machine.psi,
    "cgroup": checks_machine.cgroup,
    "hugepages": checks_memory.hugepages,
    "swap": checks_memory.swap,
    "thp": checks_memory.thp,
    "ksm": checks_memory.merging,
    "ksm-owner": checks_memory.ksm_owner,
    "memlock": checks_memory.memlock,
    "aio": checks_memory.aio,
    "nft": checks_network.nft,
    "dnsmasq": checks_network.dnsmasq,
    "forwarding": checks_network.forwarding,
    "firewall": checks_network.firewall,
    "bridge-nf": checks_network.bridge_nf,
    "bridges": checks_network.bridges,
    "dns-ports": checks_network.dns_ports,
    "leftover-links": checks_network.leftover_links,
    "images": checks_storage.images,
    "image-format": checks_storage.image_format,
    "image-rights": checks_storage.image_rights,
    "image-direct-io": checks_storage.image_direct_io,
    "image-space": checks_storage.image_space,
    "space": checks_storage.space,
    "directories": checks_storage.directories,
    "socket": checks_storage.api_socket,
    "launch-socket": checks_storage.launch_socket,
    "config": checks_system.config,
    "config-rights": checks_system.config_rights,
    "rivals": checks_system.rivals,
    "unit": checks_system.unit,
    "groups": checks_system.groups,
    "uids": checks_system.uids,
    "needrestart": checks_system.needrestart,
    "clock": checks_system.clock,
}


def judge(report: HostReport) -> tuple[Check, ...]:
    """Every check's findings; each check says at least one thing, and every warning and failure has a fix."""
    return tuple(
        Check(name, found.status, found.message, found.fix) for name, check in CHECKS.items() for found in check(report)
    )
