"""The options of QEMU's command line from qemu-kvm 0.12 to QEMU 9: which take a value, and which are kvmd's business.

From qemu-options.hx of those versions. An option that is not here cannot be told from the value before it, so it is
taken as one without a value and told as unsupported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_WITH_VALUE = """
M machine cpu accel smp numa add-fd set global boot m mem-path k audio audiodev soundhw device name uuid fda fdb hda
hdb hdc hdd cdrom blockdev drive mtdblock sd pflash fsdev virtfs virtfs_synth iscsi usbdevice display spice rotate vga
g vnc acpitable smbios netdev nic net tftp bootp redir smb chardev bt tpmdev kernel append initrd dtb compat fw_cfg
serial parallel monitor qmp qmp-pretty mon debugcon pidfile shim bios d D L icount watchdog watchdog-action action
echr virtioconsole show-cursor tb-size incoming nodefconfig prom-env old-param semihosting-config arch sandbox
readconfig writeconfig trace object msg overcommit balloon rtc startdate clock chroot runas seed plugin ctrl-grab
alt-grab loadvm run-with qtest qtest-log dump-vmstate enable-sync-profile drive-mirror pcidevice hugepage-fd
cpu-throttle nvram option-rom
"""
_WITHOUT_VALUE = """
enable-kvm no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection kvm mem-prealloc snapshot usb full-screen
nographic curses sdl no-frame no-quit alt-grab portrait win2k-hack rtc-td-hack no-fd-bootchk no-acpi no-hpet
localtime singlestep S daemonize no-reboot no-shutdown only-migratable nodefaults no-user-config nodefconfig
semihosting old-param mem-lock realtime enable-fips xen-attach preconfig audio-help h help version std-vga
no-virtio-balloon enable-nesting tdf
"""
TAKES_VALUE: Mapping[str, bool] = dict.fromkeys(_WITHOUT_VALUE.split(), False) | dict.fromkeys(
    (word for word in _WITH_VALUE.split() if word not in ("nodefconfig", "old-param", "alt-grab")), True
)

# What is kvmd's own business, or was the old way of running QEMU.
OURS: Mapping[str, str] = {
    "daemonize": "kvmd supervises QEMU itself",
    "pidfile": "kvmd knows its processes by pid and start time",
    "monitor": "kvmd has a monitor of its own; `kvmd-cli monitor` is for people",
    "qmp": "kvmd has a monitor of its own and leaves a second one to people",
    "qmp-pretty": "kvmd has a monitor of its own and leaves a second one to people",
    "mon": "kvmd has a monitor of its own and leaves a second one to people",
    "runas": "each guest has a uid of its own",
    "chroot": "QEMU gets descriptors and sees no paths",
    "sandbox": "on, unless qemu.sandbox = false",
    "run-with": "kvmd supervises QEMU itself",
    "S": "kvmd verifies a guest while it stands, then lets it go",
    "D": "QEMU's words are in the guest's log directory",
    "d": "debug output of QEMU is not kept",
    "trace": "debug output of QEMU is not kept",
    "msg": "QEMU's messages have the time",
    "no-shutdown": "QEMU waits with its reason after a shutdown; kvmd ends it",
    "L": "firmware comes from the emulator's own package",
    "full-screen": "nobody sits before it",
    "no-frame": "nobody sits before it",
    "no-quit": "nobody sits before it",
    "alt-grab": "nobody sits before it",
    "ctrl-grab": "nobody sits before it",
    "show-cursor": "nobody sits before it",
    "echr": "the console's escape is ^]",
    "tb-size": "a detail of emulation",
    "only-migratable": "kvmd does not migrate",
    "enable-sync-profile": "debug output of QEMU is not kept",
    "no-fd-bootchk": "a detail of old firmware",
    "nodefconfig": "QEMU reads no files of its own under kvmd",
    "no-user-config": "QEMU reads no files of its own under kvmd",
    "nodefaults": "kvmd gives a guest only what its file says",
    "no-kvm-irqchip": "a detail of old qemu-kvm",
    "no-kvm-pit": "a detail of old qemu-kvm",
    "no-kvm-pit-reinjection": "a detail of old qemu-kvm",
    "enable-nesting": "part of the CPU model today",
    "tdf": "a detail of old qemu-kvm",
    "clock": "a detail of old QEMU",
    "incoming": "a migration's other end, not part of the guest",
    "loadvm": "a state to go on from, not part of the guest",
}


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option without its dashes, value) of each; ("", word) for a word alone: classically the first disk."""
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-") or word == "-":
            yield "", word
            continue
        name = word.removeprefix("-").removeprefix("-")
        if TAKES_VALUE.get(name, False):
            yield name, next(rest, None)
        else:
            yield name, None
