"""The whole host read once: what `plan` is made from. Reading only; nothing is judged or changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmd.config.desired import Desired
from kvmd.effects import hugetlbfs, interrupts, kernelargs, listeners, modules, nft, pci, swap
from kvmd.effects.dnsmasq import Dnsmasqs
from kvmd.effects.netlink import Netlink
from kvmd.effects.records import EffectKind, ruleset_key
from kvmd.effects.routes import default_links, ra_uplinks
from kvmd.effects.sysfs import HostTree
from kvmd.effects.uplink import Trials
from kvmd.facts import Facts, Iommu, JournalEntry
from kvmd.plan import hugetlbfs as hugetlbfs_plan
from kvmd.plan import interrupts as irq_plan
from kvmd.plan import modules as module_plan
from kvmd.plan import network, vfio
from kvmd.plan.ksm import KNOBS
from kvmd.plan.nfttable import NETWORKS, PORTS
from kvmd.plan.ports import has_fence


@dataclass(frozen=True, slots=True)
class HostObserver:
    """Everything of the host that a plan may need."""

    tree: HostTree
    netlink: Netlink
    dnsmasqs: Dnsmasqs
    trials: Trials

    async def observe(self, desired: Desired, journal: Sequence[JournalEntry]) -> Facts:
        """The facts about the host, without its guests. `journal`: effects of ours in this boot, looked at even when
        no file asks for them any more. HostFailed."""
        knobs = {*KNOBS, *network.KNOBS, *irq_plan.KNOBS, *(e.subject for e in journal if e.kind == EffectKind.KNOB)}
        names = {*module_plan.wanted(desired), *(e.subject for e in journal if e.kind == EffectKind.MODULE)}
        swap_paths = {e.subject for e in journal if e.kind == EffectKind.SWAP_FILE}
        if desired.host.swap.file:
            swap_paths.add(desired.host.swap.file.path)
        mounts = {e.subject: e.original for e in journal if e.kind == EffectKind.HUGETLBFS}
        memory_paths = mounts.keys() | hugetlbfs_plan.wanted(desired.guests).keys()
        zrams = swap.observe_zrams(self.tree)
        with_pci = vfio.is_concerned(desired, [entry.kind for entry in journal])
        nics = [nic for guest in desired.guests.values() for nic in guest.nic.values()]
        own_taps = any(nic.has_tap and not nic.network for nic in nics)
        with_networks = bool(desired.networks) or own_taps or any(entry.kind == EffectKind.BRIDGE for entry in journal)
        over_nics = any(net.uplink for net in desired.networks.values())
        filtering = any(net.network.vlan_filtering for net in desired.networks.values())
        links = await self.netlink.observe_links(vlans=filtering) if with_networks or with_pci else ()
        with_fences = any(map(has_fence, nics))
        with_fences = with_fences or ruleset_key(PORTS) in {entry.key for entry in journal}
        with_irqs = desired.host.cpu.irq_affinity != "keep"
        fixed = {entry.subject for entry in journal if entry.kind == EffectKind.FIXED_IRQ}
        return Facts(
            boot_id=self.tree.boot_id(),
            cpus=self.tree.observe_cpus(),
            memory=self.tree.observe_memory(),
            boot=kernelargs.observe(self.tree),
            interrupts=interrupts.observe_interrupts(self.tree, fixed) if with_irqs else (),
            irqbalance=interrupts.observe_irqbalance(self.tree) if with_irqs else None,
            hugepages=self.tree.observe_hugepages(),
            free_blocks=self.tree.observe_blocks(),
            knobs=self.tree.observe_knobs(knobs),
            kernel=self.tree.kernel(),
            modules=modules.observe(self.tree, names),
            nodes=modules.observe_nodes(self.tree, module_plan.NODES.values()) if names else frozenset(),
            memory_paths=hugetlbfs.observe(self.tree, memory_paths),
            swaps=swap.observe_swaps(self.tree, (*sorted(swap_paths), *(z.path for z in zrams or () if z.ours))),
            swap_files=tuple(swap.observe_file(self.tree, path) for path in sorted(swap_paths)),
            zrams=zrams,
            pci=pci.observe(self.tree, links) if with_pci else None,
            iommu=pci.observe_iommu(self.tree) if with_pci else Iommu(),
            reservations=self.reservations(journal),
            vfs_before={
                entry.subject: int(entry.original.partition(",")[0])
                for entry in journal
                if entry.kind == EffectKind.SRIOV
            },
            links=links,
            vlan_filtering=await self.netlink.can_filter_vlans(links) if filtering else None,
            uplinks=self.trials.all(),
            default_links=default_links(self.tree) if over_nics else frozenset(),
            ra_uplinks=ra_uplinks(self.tree) if with_networks else (),
            nft=await nft.observe(NETWORKS) if with_networks else None,
            foreign_rules=await nft.list_foreign() if desired.networks else None,
            nft_ports=await nft.observe(PORTS) if with_fences else None,
            listeners=listeners.observe(self.tree) if any(net.forward for net in desired.networks.values()) else (),
            dnsmasq=self.dnsmasqs.observe(),
        )

    async def observe_devices(self, journal: Sequence[JournalEntry]) -> Facts:
        """The PCI functions and who has them, for a guest that starts. HostFailed."""
        links = await self.netlink.observe_links()
        return Facts(
            boot_id=self.tree.boot_id(),
            pci=await asyncio.to_thread(pci.observe, self.tree, links),
            iommu=pci.observe_iommu(self.tree),
            reservations=self.reservations(journal),
            links=links,
        )

    @staticmethod
    def reservations(journal: Sequence[JournalEntry]) -> Mapping[str, str]:
        """PCI function -> guest it was bound for."""
        return {entry.subject: entry.new for entry in journal if entry.kind == EffectKind.VFIO}
