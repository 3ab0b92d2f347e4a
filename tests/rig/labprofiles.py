"""The machines the lab can be: one frozen description each, small enough for 2 CPUs and a few GiB under TCG.

Pure data: `tests/rig/lab.py` boots it, the fixtures of tests/lab and `scripts/lab` name it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine: `nodes` splits CPUs and memory evenly, a socket each; `threads` is hardware threads in a core.

    `kernel` is added to its command line, `options` to QEMU's, where the order in it is kept.
    """

    cpus: int = 4
    threads: int = 1
    memory_mib: int = 3072
    nodes: int = 1
    kernel: str = ""
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """QEMU's machine, processor and memory options, then `options`."""
        # An interrupt controller split with the kernel is for KVM; TCG, where all of it is QEMU's, needs nothing of it.
        words = ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", self._model()]
        topology = f"{self.cpus},sockets={self.nodes},threads={self.threads}"
        words += ["-smp", topology, "-m", f"{self.memory_mib}M"]
        if self.nodes > 1:
            each, cpus = self.memory_mib // self.nodes, self.cpus // self.nodes
            for node in range(self.nodes):
                words += ["-object", f"memory-backend-ram,id=m{node},size={each}M"]
                words += ["-numa", f"node,nodeid={node},memdev=m{node},cpus={node * cpus}-{node * cpus + cpus - 1}"]
        return [*words, *self.options]

    def _model(self) -> str:
        # Without la57 each emulated page walk is a level shorter.
        model = "max,la57=off"
        if self.threads > 1:
            # An AMD processor tells of its threads in leaves 0x8000001d and e only (topoext), which Linux believes from
            # family 17h on. TCG answers them and does not list the flag as its own, so it has to be forced.
            model += ",family=23,topoext=on,xlevel=0x8000001e,x-force-features=on"
        return model


@dataclass(frozen=True, slots=True)
class Profile:
    """A lab by name: what it is for, and the machine."""

    name: str
    about: str
    hardware: Hardware


# An NVMe controller with up to 4 virtual functions; a plain one to be given away, on a disk that is not there; and two
# devices behind a conventional bridge, which cannot be told apart by an IOMMU: one group, and one of them in use.
_PASSTHROUGH = (
    *("-device", "intel-iommu,intremap=on,caching-mode=on"),
    *("-device", "pcie-root-port,id=rp1,chassis=1,slot=1", "-device", "nvme-subsys,id=ss0"),
    *(
        "-device",
        "nvme,id=pf,serial=sriov,subsys=ss0,bus=rp1,sriov_max_vfs=4,sriov_vq_flexible=8"
        ",sriov_vi_flexible=4,max_ioqpairs=32,msix_qsize=32",
    ),
    *("-device", "pcie-root-port,id=rp2,chassis=2,slot=2"),
    *("-blockdev", "null-co,node-name=spare,size=67108864,read-zeroes=on"),
    *("-device", "nvme,serial=spare,drive=spare,bus=rp2"),
    *("-device", "pcie-pci-bridge,id=pb1", "-device", "pci-testdev,bus=pb1,addr=1"),
    *("-device", "virtio-rng-pci,bus=pb1,addr=2"),
)

_ALL = (
    Profile(
        "isolcpus",
        "4 CPUs, of which 2 and 3 are isolated",
        Hardware(kernel="isolcpus=2,3"),
    ),
    Profile(
        "numa",
        "2 nodes, each 2 cores of 2 threads with a 1 GiB page reserved at boot",
        Hardware(cpus=8, threads=2, nodes=2, memory_mib=8192, kernel="hugepagesz=1G hugepages=0:1,1:1"),
    ),
    Profile(
        "iommu",
        "an IOMMU, an NVMe controller with virtual functions, one to give away, a group of two devices",
        Hardware(kernel="intel_iommu=on iommu=pt", options=_PASSTHROUGH),
    ),
    Profile(
        "plain",
        "2 CPUs and nothing else: a fresh Debian 12",
        Hardware(cpus=2, memory_mib=4096),
    ),
)
PROFILES = {profile.name: profile for profile in _ALL}
# What a plain scripts/test boots; the others' tests are long.
DEFAULT = "isolcpus"
