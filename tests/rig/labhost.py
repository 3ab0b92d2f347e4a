"""kvmd installed in a lab as on a real host, and taken away again so that the lab is as it was; lab tests stand on it.

@pytest.fixture(scope="module")
def host(lab_numa: Lab) -> Iterator[LabHost]:
    with kvmd_in(lab_numa) as host:
        host.guest("web", kvm_guest("web"))
        yield host
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.rig.guestimage import guest_kernel
from tests.rig.lab import Lab

IMAGES = "/srv/vm"
# What an administrator would look at to see whether something was left behind. What systemd 252 keeps of units that
# have been killed and unloaded (log-extra-fields:) is its own.
STATE = """
cd /sys/devices/system/node && grep -s . node*/hugepages/hugepages-*/nr_hugepages
grep -s . /sys/kernel/mm/ksm/run /sys/kernel/mm/ksm/pages_to_scan /sys/kernel/mm/transparent_hugepage/enabled
grep -s . /proc/sys/vm/swappiness /proc/sys/net/ipv4/ip_forward /proc/irq/default_smp_affinity
cat /proc/irq/*/smp_affinity_list | sort | uniq -c
cat /proc/swaps
ip -o link | cut -d: -f2,3 | cut -d' ' -f2 | sort
nft list ruleset
find /etc /opt /srv /run /usr/local /var/lib /var/log -name '*kvmd*' -not -path '/run/systemd/units/*' | sort
systemctl --failed --plain --no-legend
pgrep -x 'qemu-system-x86|dnsmasq|kvmd' && echo still running
"""


class LabHost:
    """kvmd in a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def host(self, text: str) -> None:
        """/etc/kvmd/host.toml"""
        self.lab.write("/etc/kvmd/host.toml", text)

    def network(self, name: str, text: str) -> None:
        """networks.d/NAME.toml"""
        self.lab.write(f"/etc/kvmd/networks.d/{name}.toml", text)

    def guest(self, name: str, text: str) -> None:
        """guests.d/NAME.toml"""
        self.lab.write(f"/etc/kvmd/guests.d/{name}.toml", text)

    def cli(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """kvmd-cli --json: what it printed; LabFailed when it fails."""
        return json.loads(self.lab.check(["kvmd-cli", "--json", *arguments], timeout_s=timeout_s) or "null")

    def show(self, name: str) -> Any:
        """guest.show"""
        return self.cli("show", name)

    def plan(self) -> Any:
        """host.plan; the command's status says only whether there is something to do."""
        return json.loads(self.lab.run(["kvmd-cli", "--json", "plan"], timeout_s=120).stdout)

    def apply(self, timeout_s: float = 240.0) -> Any:
        """host.apply as a person who says yes: the report."""
        return self.cli("--yes", "apply", timeout_s=timeout_s)

    def wait_serial(self, name: str, text: str, timeout_s: float = 300.0) -> None:
        """Until the guest has said that on its console."""
        self.lab.wait_for(f"grep -q '{text}' /var/log/kvmd/{name}/serial-console.log", timeout_s=timeout_s)

    def restart(self) -> None:
        """kvmd dies by SIGKILL and comes back."""
        self.lab.check("systemctl kill --signal=SIGKILL kvmd")
        self.lab.wait_for("systemctl is-active --quiet kvmd && kvmd-cli list", timeout_s=120)

    def affinity(self, pid: int, threads: str = "*") -> dict[str, str]:
        """Thread name -> CPU list, of a process' threads."""
        shown = self.lab.check(
            f"for t in /proc/{pid}/task/{threads}; do echo $(cat $t/comm):"
            "$(sed -n 's/^Cpus_allowed_list:\\t//p' $t/status); done"
        )
        return dict(line.rsplit(":", 1) for line in shown.splitlines())


@contextmanager
def kvmd_in(lab: Lab, *, host: str = "") -> Iterator[LabHost]:
    """Install, put the test guest's files where images may lie, enable and start kvmd; afterwards take it all away.

    AssertionError when the lab is not as it was then: whatever a test did, kvmd has to be able to give it back.
    """
    with left_as_it_was(lab):
        lab.install()
        kernel, initrd = guest_kernel()
        lab.check(f"mkdir -p {IMAGES} && cp {kernel} {IMAGES}/vmlinuz && cp {initrd} {IMAGES}/initrd")
        lab.check(f"chmod 644 {IMAGES}/*")
        found = LabHost(lab)
        found.host(host)
        lab.check("systemctl enable --quiet --now kvmd", timeout_s=240)
        try:
            yield found
        finally:
            take_away(lab)


@contextmanager
def left_as_it_was(lab: Lab) -> Iterator[None]:
    """AssertionError when the lab's state is another one at the end."""
    before = lab.run(STATE).stdout
    yield
    after = lab.run(STATE).stdout
    assert after == before, f"the lab is not as it was\n--- before\n{before}\n--- after\n{after}"


def take_away(lab: Lab) -> None:
    """Every guest killed, everything released, kvmd uninstalled with all it kept.

    Again and again for a while: one that just crashed and is on its way back, its file gone too, is killed when it is
    there, and release waits for nobody.
    """
    names = "import json, sys; print(*(guest['name'] for guest in json.load(sys.stdin)['guests']))"
    kill = f'for guest in $(kvmd-cli --json list | /usr/bin/python3 -c "{names}"); do kvmd-cli kill $guest; done'
    lab.wait_for(f"{kill}; kvmd-cli --yes host release", timeout_s=240)
    lab.check("/src/kvmd/scripts/uninstall --purge", timeout_s=240)
    lab.run(f"systemctl reset-failed; rm -rf {IMAGES}")


def kvm_guest(
    role: str,
    *,
    size: str = "192MiB",
    cpu: str = "",
    memory: str = "",
    nic: str = "",
    extra: str = "",
    cmdline: str = "kvmd.ip=none",
) -> str:
    """A Linux guest under the lab's KVM; `cpu`, `memory` and `extra` are further lines of the file.

    `quiet` and `mitigations=off` because leaving the guest costs half a millisecond here.
    """
    return f"""
[machine]
accel = "kvm"
default_nic = false
[cpu]
model = "host"
{cpu}
[memory]
size = "{size}"
{memory}
[boot]
kernel = "{IMAGES}/vmlinuz"
initrd = "{IMAGES}/initrd"
cmdline = "console=ttyS0 quiet mitigations=off kvmd.role={role} {cmdline}"
[serial.console]
log = true
{nic}
{extra}
"""
