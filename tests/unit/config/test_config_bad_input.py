# ruff: noqa: E501 - messages are compared as they are shown, on one line
"""Everything an operator can get wrong in a file is one message at its line, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.config.load import load

GUEST, NETWORK, HOST, DAEMON = "guests.d/web.toml", "networks.d/lan.toml", "host.toml", "kvmd.toml"
BASE = '[memory]\nsize = "1GiB"\n[nic.a]\ntype = "user"\n'
DISK = '[disk.root]\nfile = "/srv/vm/nowhere.img"\nformat = "raw"\n'
NAT = '[network]\nmode = "nat"\n[ipv4]\naddress = "10.0.0.1/24"\n'

# (file, its text, every error with the file's name left out)
CASES = [
    (
        GUEST,
        '[memory]\nsise = "8GiB"\nsize = "1GiB"\n[nic.a]\ntype = "user"\n',
        [":2: memory.sise: unknown key (did you mean memory.size?)"],
    ),
    (GUEST, BASE + '[memroy]\nsize = "1GiB"\n', [":5: memroy: unknown key (did you mean memory?)"]),
    (GUEST, "vcpus = 4\n" + BASE, [":1: vcpus: unknown key (did you mean cpu.vcpus?)"]),
    (GUEST, BASE + "[xyzzy]\n", [":5: xyzzy: unknown key"]),
    (GUEST, '[nic.a]\ntype = "user"\n', [': memory.size: is required (for example size = "8GiB")']),
    (
        GUEST,
        '[memory]\nsize = 8\n[nic.a]\ntype = "user"\n',
        [':2: memory.size: wants a size in quotes, for example "8GiB"; this is the number 8'],
    ),
    (
        GUEST,
        '[memory]\nsize = "8"\n[nic.a]\ntype = "user"\n',
        [':2: memory.size: "8" has no unit: write "8MiB" or "8GiB"'],
    ),
    (
        GUEST,
        '[memory]\nsize = "8GB"\n[nic.a]\ntype = "user"\n',
        [':2: memory.size: "8GB" is decimal (8000000000 bytes); sizes are binary: write "8GiB"'],
    ),
    (GUEST, '[memory]\nsize = "0"\n[nic.a]\ntype = "user"\n', [":2: memory.size: must be more than nothing"]),
    (
        GUEST,
        '[memory]\nsize = "100KiB"\n[nic.a]\ntype = "user"\n',
        [':2: memory.size: "100KiB" is not a whole number of MiB'],
    ),
    (
        GUEST,
        '[memory]\nsize = ["1GiB"]\n[nic.a]\ntype = "user"\n',
        [':2: memory.size: wants a size in quotes, for example "8GiB"; this is a list'],
    ),
    (
        GUEST,
        BASE + "[cpu]\nvcpus = true\n",
        [":6: cpu.vcpus: wants a whole number, for example 4; this is true (yes or no)"],
    ),
    (
        GUEST,
        BASE + '[cpu]\nvcpus = "4"\n',
        [':6: cpu.vcpus: wants a whole number, for example 4; this is the text "4"'],
    ),
    (
        GUEST,
        BASE + "[cpu]\nvcpus = 4.0\n",
        [":6: cpu.vcpus: wants a whole number, for example 4; this is the number 4.0"],
    ),
    (GUEST, BASE + "[cpu]\nvcpus = 0\n", [":6: cpu.vcpus: 0 is out of range: at least 1"]),
    (GUEST, BASE + "[cpu]\nvcpus = 5000\n", [":6: cpu.vcpus: 5000 is out of range: at most 1024"]),
    (
        GUEST,
        BASE + "[cpu]\nvcpus = 4\nsockets = 2\ncores = 3\nthreads = 2\n",
        [":6: cpu.vcpus: sockets 2 x dies 1 x cores 3 x threads 2 = 12, but cpu.vcpus = 4"],
    ),
    (
        GUEST,
        BASE + "[cpu]\nvcpus = 4\nsockets = 3\n",
        [":6: cpu.vcpus: 4 vCPUs cannot be divided by sockets 3 x dies 1 x threads 1"],
    ),
    (
        GUEST,
        BASE + '[cpu]\nplacement = "dedicate"\n',
        [
            ':6: cpu.placement: "dedicate" is not one of "none", "shared", "dedicated", "manual" (did you mean "dedicated"?)'
        ],
    ),
    (
        GUEST,
        BASE + "[cpu]\nplacement = 3\n",
        [
            ':6: cpu.placement: wants one of "none", "shared", "dedicated", "manual", for example "shared"; this is the number 3'
        ],
    ),
    (
        GUEST,
        BASE + '[cpu]\nplacement = "manual"\n',
        [':6: cpu.placement: "manual" needs cpu.pin (one host CPU per vCPU, for example pin = [4, 5])'],
    ),
    (
        GUEST,
        BASE + '[cpu]\nvcpus = 2\nplacement = "manual"\npin = [4]\n',
        [":8: cpu.pin: names 1 host CPUs, but cpu.vcpus = 2"],
    ),
    (GUEST, BASE + "[cpu]\nvcpus = 2\npin = [4, 5]\n", [':7: cpu.pin: only with placement = "manual"; it is "shared"']),
    (
        GUEST,
        BASE + '[cpu]\nvcpus = 2\nplacement = "manual"\npin = [4, 4]\n',
        [":8: cpu.pin: names a host CPU twice (cpu.allow_overcommit = true if that is meant)"],
    ),
    (GUEST, BASE + '[cpu]\nplacement = "manual"\npin = [-1]\n', [":7: cpu.pin: -1 is not a CPU between 0 and 8191"]),
    (
        GUEST,
        BASE + '[cpu]\nplacement = "manual"\npin = ["4"]\n',
        [':7: cpu.pin: wants a list of numbers, for example [4, 36, 5, 37]; item 1 is the text "4"'],
    ),
    (GUEST, BASE + '[cpu]\nemulator = "3-1"\n', [':6: cpu.emulator: "3-1" is not a range of CPUs between 0 and 8191']),
    (
        GUEST,
        BASE + '[cpu]\nemulator = ""\n',
        [':6: cpu.emulator: is an empty CPU set; write for example "0-3,8", or leave the key out'],
    ),
    (
        GUEST,
        BASE + '[cpu]\nmodel = "ho st"\n',
        [':6: cpu.model: "ho st" is not a word of QEMU\'s (letters, digits, _ . -)'],
    ),
    (
        GUEST,
        BASE + '[cpu]\nmodel = "host"\n[machine]\naccel = "tcg"\n',
        [':6: cpu.model: "host" needs KVM, but machine.accel = "tcg" (use "max")'],
    ),
    (
        GUEST,
        BASE + '[cpu]\nfeatures = { hle = "off" }\n',
        [
            ':6: cpu.features.hle: wants a table of names with true or false, for example { "hle" = false }; this is the text "off"'
        ],
    ),
    (
        GUEST,
        BASE + '[cpu]\nfeatures = { "a,b" = true }\n',
        [':6: cpu.features."a,b": "a,b" is not a word of QEMU\'s (letters, digits, _ . -)'],
    ),
    (GUEST, BASE + "[cpu]\nmax_vcpus = 8\n", [":6: cpu.max_vcpus: not supported yet"]),
    (GUEST, "cpu = 4\n" + BASE, [":1: cpu: is a table, not the number 4: write [cpu] and its keys below"]),
    (
        GUEST,
        BASE + '[boot]\nfirmware = "uefi"\n',
        [':6: boot.firmware: "uefi" is not supported yet (supported: "bios")'],
    ),
    (GUEST, BASE + "[boot]\nsecure_boot = true\n", [":6: boot.secure_boot: true is not supported yet"]),
    (GUEST, BASE + '[boot]\ninitrd = "/i"\n', [":6: boot.initrd: only with boot.kernel"]),
    (
        GUEST,
        BASE + '[boot]\norder = ["disk.root", "nic.a"]\n',
        [':6: boot.order: this guest has no "disk.root" (there is: nic.a)'],
    ),
    (
        GUEST,
        BASE + '[boot]\norder = "xyz"\n',
        [':6: boot.order: "xyz" is not a boot order: classic letters as in "cn", each once'],
    ),
    (
        GUEST,
        BASE + "[boot]\norder = 3\n",
        [':6: boot.order: wants a list such as ["disk.root", "nic.lan"], or letters as in "cn"; this is the number 3'],
    ),
    (
        GUEST,
        BASE + '[boot]\nkernel = "vmlinuz"\n',
        [':6: boot.kernel: "vmlinuz" is not an absolute path (it must begin with /)'],
    ),
    (
        GUEST,
        BASE + '[boot]\nkernel = "/boot/k"\ncmdline = "a\\nb"\n',
        [":7: boot.cmdline: holds a control character (U+000A); one line of plain text is wanted"],
    ),
    (GUEST, BASE + '[tpm]\nversion = "2.0"\n', [":6: tpm.version: not supported yet"]),
    (
        GUEST,
        BASE + '[hostdev.gpu]\npci = "1:0.0"\n',
        [':6: hostdev.gpu.pci: "1:0.0" is not a PCI function: write for example "0000:3b:00.0", as `lspci -D` does'],
    ),
    (
        GUEST,
        BASE + '[hostdev.gpu]\npci = "0000:3b:00.0"\n[hostdev.x]\npci = "3B:00.0"\n',
        [":8: hostdev.x.pci: 0000:3b:00.0 is hostdev.gpu's too"],
    ),
    (
        GUEST,
        BASE + '[hostdev.gpu]\npci = "3b:00.0"\n[memory.balloon]\nenabled = true\n',
        [
            ":8: memory.balloon.enabled: a guest with hostdev.gpu cannot be ballooned: the device may write to any of "
            "its memory (leave the key out)"
        ],
    ),
    (GUEST, BASE + '[hostdev.stick]\nusb = "1234:5678"\n', [":6: hostdev.stick.usb: not supported yet"]),
    (
        GUEST,
        BASE + '[nic.v]\ntype = "vf"\n',
        [
            ':5: nic.v: type = "vf" needs pool or pci (for example pool = "enp59s0f0", with [sriov.enp59s0f0] in '
            "host.toml)"
        ],
    ),
    (
        GUEST,
        BASE + '[nic.v]\ntype = "vf"\npool = "ens1"\nmodel = "e1000"\nvlan = 4095\n',
        [":9: nic.v.vlan: 4095 is outside 1 to 4094"],
    ),
    (
        GUEST,
        BASE + '[nic.v]\ntype = "vf"\npool = "ens1"\nmodel = "e1000"\n',
        [':8: nic.v.model: not with type = "vf": the guest sees the card itself (leave the key out)'],
    ),
    (
        GUEST,
        BASE + '[nic.v]\nnetwork = "lan"\npool = "ens1"\n',
        [':7: nic.v.pool: only with type = "vf"'],
    ),
    (
        GUEST,
        BASE + '[display]\ntype = "spice"\n',
        [':6: display.type: "spice" is not supported yet (supported: "none", "vnc")'],
    ),
    (
        GUEST,
        BASE + '[display]\ntype = "vnc"\nlisten = "127.0.0.1:1"\n',
        [':7: display.listen: "127.0.0.1:1" is not supported yet (supported: "unix")'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nbacking = "hugepages"\n[memory.balloon]\nenabled = true\n',
        [
            ":7: memory.balloon.enabled: a hugepage guest cannot be ballooned: it would lose the memory and the host gain none (leave the key out, or use another backing)"
        ],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1025MiB"\nbacking = "hugepages"\n',
        [':4: memory.size: "1025MiB" is 512.50 pages of 2MiB; a whole number is needed (for example "1026MiB")'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nbacking = "hugepages"\npage_size = "3MiB"\n',
        [':6: memory.page_size: "3MiB" is no size of page any host has ("2MiB" or "1GiB")'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\npage_size = "2MiB"\n',
        [':5: memory.page_size: only with backing = "hugepages" or "file"; it is "anonymous"'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nbacking = "hugepages"\nguaranteed = "1GiB"\n',
        [":6: memory.guaranteed: hugepages are neither ballooned nor merged (leave the key out)"],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nguaranteed = "2GiB"\n',
        [':5: memory.guaranteed: "2GiB" is more than memory.size = "1GiB"'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nbacking = "file"\n',
        [':5: memory.backing: "file" needs memory.path (a directory, for example path = "/dev/shm")'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\nlock = true\nguaranteed = "1GiB"\n',
        [":6: memory.guaranteed: locked memory is never ballooned (leave the key out, or memory.lock)"],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\npolicy = "bind"\n',
        [':5: memory.policy: only with memory.nodes (for example nodes = "0")'],
    ),
    (
        GUEST,
        '[nic.a]\ntype = "user"\n[memory]\nsize = "1GiB"\npath = "/dev/shm"\n',
        [':5: memory.path: only with backing = "file"; it is "anonymous"'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nfile = "/srv/vm/nowhere.img"\n',
        [':5: disk.root.format: is required (format = "raw" or format = "qcow2")'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nformat = "raw"\n',
        [':5: disk.root.file: is required (for example file = "/srv/vm/web.qcow2")'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nfile = "/srv/vm/a"\nformat = "vmdk"\n',
        [':7: disk.root.format: "vmdk" is not supported yet (supported: "raw", "qcow2")'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nfile = "a.img"\nformat = "raw"\n',
        [':6: disk.root.file: "a.img" is not an absolute path (it must begin with /)'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nfile = "/srv/../etc/shadow"\nformat = "raw"\n',
        [':6: disk.root.file: "/srv/../etc/shadow" contains ".."; write the path as it is'],
    ),
    (
        GUEST,
        BASE + '[disk.root]\nfile = "/srv/vm/a\\u0000b"\nformat = "raw"\n',
        [":6: disk.root.file: holds a control character (U+0000); one line of plain text is wanted"],
    ),
    (
        GUEST,
        BASE + '[disk."ro ot"]\nfile = "/srv/vm/a"\nformat = "raw"\n',
        [
            ':5: disk."ro ot": "ro ot" is not a name: 1 to 20 of a-z, 0-9, _ and -, beginning and ending with a letter or digit'
        ],
    ),
    (
        GUEST,
        BASE + '[disk]\nfile = "/srv/vm/a"\n',
        [':6: disk.file: is a table, not the text "/srv/vm/a": write [disk.file] and its keys below'],
    ),
    (GUEST, BASE + "disk = 3\n", [":5: nic.a.disk: unknown key"]),
    (GUEST, "disk = 3\n" + BASE, [":1: disk: is a table, not the number 3: write [disk.NAME] and its keys below"]),
    (
        GUEST,
        BASE + DISK + 'serial = "123456789012345678901"\n',
        [':8: disk.root.serial: "123456789012345678901" has 21 bytes; virtio-blk takes 1 to 20 (VIRTIO_BLK_ID_BYTES)'],
    ),
    (
        GUEST,
        BASE + DISK + 'aio = "native"\ncache = "writeback"\n',
        [
            ':8: disk.root.aio: "native" needs direct I/O, but cache = "writeback" (cache = "none" or "directsync", or aio = "threads")'
        ],
    ),
    (
        GUEST,
        BASE + DISK + 'media = "cdrom"\nreadonly = false\n',
        [":9: disk.root.readonly: a CD is always read-only (leave the key out)"],
    ),
    (
        GUEST,
        BASE + DISK + 'interface = "mtd"\n',
        [
            ':8: disk.root.interface: "mtd" is not supported yet '
            '(supported: "virtio", "scsi", "ide", "sata", "nvme", "usb", "floppy", "sd")'
        ],
    ),
    (
        GUEST,
        BASE + DISK + 'detect_zeroes = "unmap"\n',
        [':8: disk.root.detect_zeroes: "unmap" needs discard = "unmap"'],
    ),
    (
        GUEST,
        BASE + DISK + 'pci_address = "40.0"\n',
        [':8: disk.root.pci_address: "40.0" is not a PCI slot: write slot and function, for example "05.0" (00 to 1f)'],
    ),
    (GUEST, BASE + DISK + "throttle = { iops = 2000 }\n", [":8: disk.root.throttle: not supported yet"]),
    (
        GUEST,
        BASE + DISK + '[disk.b]\nfile = "/srv/vm/nowhere.img"\nformat = "raw"\n',
        [':9: disk.b.file: "/srv/vm/nowhere.img" is the file of disk.root too'],
    ),
    (
        GUEST,
        '[memory]\nsize = "1GiB"\n[nic.a]\nmodel = "virtio"\n',
        [':3: nic.a: needs network (network = "NAME", or type = "user")'],
    ),
    (
        GUEST,
        '[memory]\nsize = "1GiB"\n[nic.a]\ntype = "hub"\nhub = 1\n',
        [
            ':4: nic.a.type: "hub" is not supported yet (supported: "user", "tap", "bridge", "vf")',
            ":5: nic.a.hub: not supported yet",
        ],
    ),
    *(
        (GUEST, f'[memory]\nsize = "1GiB"\n[nic.a]\ntype = "{kind}"\n{keys}\n', complaints)
        for kind, keys, complaints in (
            (
                "tap",
                "fd = 3",
                [
                    ":5: nic.a.fd: a descriptor number means nothing to a daemon: it is open in no process that kvmd"
                    ' could ask (ifname = "tap7" uses a TAP that is there: ip tuntap add tap7 mode tap)'
                ],
            ),
            (
                "tap",
                'fd = 3\nifname = "tap7"\nscript = "/etc/qemu-ifup"\nvnet_hdr = true',
                [
                    ":5: nic.a.fd: excludes ifname, script, vnet_hdr: what somebody else opened must not be named or"
                    " set up again (and a number means nothing to a daemon: take fd out)"
                ],
            ),
            (
                "tap",
                "vhostfd = 4",
                [
                    ":5: nic.a.vhostfd: a descriptor number means nothing to a daemon (vhost = true: kvmd opens"
                    " /dev/vhost-net itself)"
                ],
            ),
            (
                "tap",
                'helper = "/usr/lib/qemu/qemu-bridge-helper"\nifname = "tap7"\nscript = "/etc/qemu-ifup"\nvnet_hdr = true',
                [
                    f":{line}: nic.a.{key}: excluded by helper, which makes, names and plugs in the TAP (leave out {key}"
                    " or helper)"
                    for line, key in ((6, "ifname"), (7, "script"), (8, "vnet_hdr"))
                ],
            ),
            ("tap", 'script = "no"', [':5: nic.a.script: "no" is not an absolute path (it must begin with /)']),
            (
                "tap",
                'ifname = "tap%d"',
                [':5: nic.a.ifname: "tap%d" is not an interface name: 1 to 15 of letters, digits, _ . and -'],
            ),
            ("tap", 'br = "br0"', [':5: nic.a.br: only with type = "bridge", or with helper']),
            ("tap", "guard = true", [":5: nic.a.guard: only with network"]),
            ("tap", 'ipv4 = "192.168.1.3"', [":5: nic.a.ipv4: only with network"]),
            ("bridge", 'script = "/etc/qemu-ifup"', [':5: nic.a.script: only with type = "tap"']),
            ("user", 'helper = "/usr/lib/x"', [':5: nic.a.helper: only with type = "tap" or "bridge"']),
            (
                "user",
                "vhost = true",
                [':5: nic.a.vhost: only with a TAP: network, or type = "tap" or "bridge"'],
            ),
            (
                "bridge",
                'vhost = true\nmodel = "e1000"',
                [':5: nic.a.vhost: only with model = "virtio"; it is "e1000"'],
            ),
            (
                "bridge",
                "vhost = false\nvhostforce = true",
                [":6: nic.a.vhostforce: contradicts vhost = false (leave one of them out)"],
            ),
        )
    ),
    (
        GUEST,
        '[memory]\nsize = "1GiB"\n[nic.a]\nnetwork = "lam"\n',
        [':4: nic.a.network: unknown network "lam" (did you mean "lan"?)'],
    ),
    (
        GUEST,
        BASE + 'mac = "01:00:5e:00:00:01"\n',
        [
            ':5: nic.a.mac: "01:00:5e:00:00:01" is a multicast address (the first byte is odd); a NIC needs a unicast one'
        ],
    ),
    (
        GUEST,
        BASE + 'mac = "52:54:00:12:34"\n',
        [':5: nic.a.mac: "52:54:00:12:34" is not a MAC address: write for example "52:54:00:12:34:56"'],
    ),
    (
        GUEST,
        BASE + 'ipv4 = "192.168.1.300"\n',
        [':5: nic.a.ipv4: "192.168.1.300" is not an IPv4 address: write for example "192.168.50.20"'],
    ),
    (GUEST, BASE + 'ipv4 = "192.168.1.3"\n', [":5: nic.a.ipv4: only with network"]),
    (
        GUEST,
        BASE + 'hostfwd = ["tcp::70000-:22"]\n',
        [':5: nic.a.hostfwd: "tcp::70000-:22": 70000 is not a port between 1 and 65535'],
    ),
    (
        GUEST,
        BASE + 'hostfwd = ["8080:80"]\n',
        [
            ':5: nic.a.hostfwd: "8080:80" is not a forwarding: PROTOCOL:ADDRESS:PORT-ADDRESS:PORT, for example "tcp:127.0.0.1:8080-:80"'
        ],
    ),
    (GUEST, BASE + 'vectors = 4\nmodel = "e1000"\n', [':5: nic.a.vectors: only with model = "virtio"; it is "e1000"']),
    (GUEST, BASE + "guard = true\n", [":5: nic.a.guard: only with network"]),
    (GUEST, BASE + 'rate_in = "10Mbit"\n', [":5: nic.a.rate_in: only with network"]),
    (
        GUEST,
        BASE + 'rate_out = "1Kbit"\n',
        [':5: nic.a.rate_out: "1Kbit" is outside what can be kept: "8Kbit" to "32Gbit"'],
    ),
    (
        GUEST,
        BASE + 'rate_out = "100M"\n',
        [':5: nic.a.rate_out: "100M" is not a bandwidth: write for example "100Mbit" or "2Gbit"'],
    ),
    (
        GUEST,
        BASE + 'pci_address = "05"\n[nic.b]\ntype = "user"\npci_address = "05"\n',
        [':8: nic.b.pci_address: "05" is the slot of nic.a too'],
    ),
    (GUEST, BASE + 'mtu = 9000\nmodel = "e1000"\n', [':5: nic.a.mtu: only with model = "virtio"; it is "e1000"']),
    (GUEST, BASE + "queues = 4\n", [':5: nic.a.queues: only with a TAP: network, or type = "tap" or "bridge"']),
    (
        GUEST,
        BASE + '[guest]\nuuid = "web"\n',
        [':6: guest.uuid: "web" is not a UUID: write for example "6f0d2c6e-9a0f-4a57-8a0c-3b3f7b6f7a11"'],
    ),
    (
        GUEST,
        BASE + '[guest]\nuuid = "00000000-0000-0000-0000-000000000000"\n',
        [":6: guest.uuid: the all-zero UUID identifies nothing; leave the key out and one is made"],
    ),
    (GUEST, BASE + '[guest]\nprofile = "linux"\n', [':6: guest.profile: unknown profile "linux" (there is: none)']),
    (GUEST, BASE + '[guest]\nprotect = ["all"]\n', [':6: guest.protect: "all" is not one of "delete", "stop"']),
    (
        GUEST,
        BASE + "[guest]\ncluster = true\n[start]\nauto = true\n",
        [":8: start.auto: refused with guest.cluster = true: the cluster manager starts this guest"],
    ),
    (
        GUEST,
        BASE + '[start]\nafter = ["nas"]\n',
        [':6: start.after: unknown guest "nas" (there is no guests.d/nas.toml)'],
    ),
    (GUEST, BASE + '[start]\nafter = ["web"]\n', [":6: start.after: a guest cannot start after itself"]),
    (
        GUEST,
        BASE + '[start]\nafter = "nas"\n',
        [':6: start.after: wants a list of names, for example ["nas"]; this is the text "nas"'],
    ),
    (
        GUEST,
        BASE + '[start]\nafter = ["NAS/1"]\n',
        [
            ':6: start.after: "NAS/1" is not a name: 1 to 47 of a-z, 0-9 and -, beginning and ending with a letter or digit'
        ],
    ),
    (GUEST, BASE + '[start]\nready = "agent"\n', [":6: start.ready: not supported yet"]),
    (
        GUEST,
        BASE + '[start]\nauto = "yes"\n',
        [':6: start.auto: wants true or false, without quotes, for example true; this is the text "yes"'],
    ),
    (
        GUEST,
        BASE + "[stop]\ntimeout = 180\n",
        [':6: stop.timeout: wants a duration in quotes, for example "3min"; this is the number 180'],
    ),
    (
        GUEST,
        BASE + '[stop]\ntimeout = "3 hours"\n',
        [':6: stop.timeout: "3 hours" is not a duration: write for example "500ms", "30s", "3min", "12h", "90d"'],
    ),
    (
        GUEST,
        BASE + '[limits]\nmemory_max = "512MiB"\n',
        [':6: limits.memory_max: "512MiB" is less than memory.size = "1GiB": the kernel would kill it'],
    ),
    (
        GUEST,
        BASE + "[limits]\noom_score_adjust = -2000\n",
        [":6: limits.oom_score_adjust: -2000 is out of range: at least -1000"],
    ),
    (
        GUEST,
        BASE + '[machine]\nemulator = "bin/qemu"\n',
        [':6: machine.emulator: "bin/qemu" is not a program\'s name or absolute path'],
    ),
    (
        GUEST,
        BASE + '[qemu]\nextra_args = "-s"\n',
        [
            ':6: qemu.extra_args: wants a list of texts, for example ["-global", "isa-fdc.driveA="]; this is the text "-s"'
        ],
    ),
    (GUEST, BASE + "[vsock]\ncid = 3\n", [":6: vsock.cid: not supported yet"]),
    (
        GUEST,
        BASE + '[rtc]\nbase = "2026-02-30"\n',
        [':6: rtc.base: "2026-02-30" is no day or time there is'],
    ),
    (
        GUEST,
        BASE + '[boot]\nsplash = "/srv/vm/a.bmp"\nsplash_time = "2min"\n',
        [
            ":6: boot.splash: is shown with the boot menu only (boot.menu = true)",
            ':7: boot.splash_time: "2min" is more than 65.535 s',
            ":7: boot.splash_time: is shown with the boot menu only (boot.menu = true)",
        ],
    ),
    (
        GUEST,
        BASE + '[video]\nmodel = "std"\nmemory = "3MiB"\n',
        [':7: video.memory: "3MiB" is not 1, 2, 4 ... 512 MiB'],
    ),
    (
        GUEST,
        BASE + '[display]\nkeyboard = "german"\n',
        [':6: display.keyboard: "german" is not a keyboard layout such as "de" or "en-us"'],
    ),
    (
        GUEST,
        BASE + '[usb]\ncontroller = "none"\ntablet = true\n',
        [':6: usb.controller: "none", and the guest has USB devices (leave the key out)'],
    ),
    (
        GUEST,
        BASE + "[guest]\ndescription = 1979-05-27\n",
        [':6: guest.description: wants text in quotes, for example "shop front end"; this is a date or time'],
    ),
    (GUEST, "schema = 2\n" + BASE, [":1: schema: 2 is not supported; the only value is 1"]),
    (GUEST, '[memory]\nsize = "1GiB"\n[memory]\n', [":3: not TOML: Cannot declare memory twice (column 8)"]),
    (GUEST, "[memory\n", [":1: not TOML: Expected ']' at the end of a table declaration (column 8)"]),
    (GUEST, 'a = "x\n', [":1: not TOML: Illegal character '\\n' (column 7)"]),
    (GUEST, "", [': memory.size: is required (for example size = "8GiB")']),
    (NETWORK, "", [': network: the table [network] is required (with mode = "nat")']),
    (
        NETWORK,
        '[network]\nmode = "macvtap"\n',
        [':2: network.mode: "macvtap" is not supported yet (supported: "nat", "routed", "isolated", "bridge")'],
    ),
    (
        NETWORK,
        '[network]\nmode = "nat"\n',
        [': ipv4: mode = "nat" needs [ipv4] or [ipv6] (for example address = "192.168.50.1/24")'],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\n',
        [':1: network.bridge: mode = "bridge" needs the name of an existing bridge'],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\nbridge = "br0"\n[ipv4]\naddress = "10.0.0.1/24"\n',
        [':4: ipv4: only where kvmd makes the bridge; with mode = "bridge" it only adds ports'],
    ),
    (
        NETWORK,
        '[network]\nmode = "isolated"\nbridge = "br%d"\n',
        [':3: network.bridge: "br%d" is not an interface name: 1 to 15 of letters, digits, _ . and -'],
    ),
    (
        NETWORK,
        '[network]\nmode = "isolated"\nbridge = "a-much-too-long-name"\n',
        [':3: network.bridge: "a-much-too-long-name" is not an interface name: 1 to 15 of letters, digits, _ . and -'],
    ),
    (
        NETWORK,
        NAT.replace("10.0.0.1/24", "10.0.0.1"),
        [':4: ipv4.address: "10.0.0.1" is not an IPv4 address with its prefix: write for example "192.168.50.1/24"'],
    ),
    (
        NETWORK,
        NAT.replace("10.0.0.1/24", "10.0.0.0/24"),
        [
            ':4: ipv4.address: "10.0.0.0/24" is the network\'s own or its broadcast address; the host needs one in between'
        ],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.9"]\n',
        [
            ':6: ipv4.dhcp.range: wants a list of 2 IPv4 addresses, for example ["192.168.50.100", "192.168.50.200"]; this list has 1'
        ],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.1.2", "10.0.1.9"]\n',
        [":6: ipv4.dhcp.range: 10.0.1.2 is outside the network's addresses 10.0.0.1 to 10.0.0.254"],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.9", "10.0.0.2"]\n',
        [":6: ipv4.dhcp.range: 10.0.0.9 is above 10.0.0.2; write the lower one first"],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.1", "10.0.0.9"]\n',
        [":6: ipv4.dhcp.range: 10.0.0.1 to 10.0.0.9 contains the host's own address 10.0.0.1"],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\nlease = "30s"\n',
        [':7: ipv4.dhcp.lease: "30s" is too short: at least "2min"'],
    ),
    (
        NETWORK,
        NAT + '[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv4 = "10.0.0.9"\n',
        [":7: reservation.p.ipv4: needs [ipv4.dhcp]: nobody hands the address out"],
    ),
    (
        NETWORK,
        NAT
        + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\n[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv4 = "10.0.0.1"\n',
        [":9: reservation.p.ipv4: 10.0.0.1 is the host's own address"],
    ),
    (
        NETWORK,
        NAT + '[forward.shop]\nlisten = "203.0.113.7:443"\n',
        [':5: forward.shop.to: is required (for example to = "web:443")'],
    ),
    *(
        (NETWORK, NAT + f'[forward.shop]\nto = "web:443"\nlisten = "{listen}"\n', [f":7: forward.shop.listen: {why}"])
        for listen, why in (
            (
                "443",
                '"443" is not an IPv4 address and a port: write for example "203.0.113.7:443", or ":443" for every'
                " address of the host",
            ),
            (
                "[::1]:443",
                '"[::1]:443" is not an IPv4 address and a port: write for example "203.0.113.7:443", or ":443" for'
                " every address of the host",
            ),
            (":70000", '":70000": "70000" is not a port between 1 and 65535'),
            (":0", '":0": "0" is not a port between 1 and 65535'),
            ("203.0.113:443", '"203.0.113" is not an IPv4 address: write for example "192.168.50.20"'),
            (
                "127.0.0.1:443",
                '"127.0.0.1:443": packets to 127.0.0.1 cannot be sent on to a guest; for every address of the host write'
                ' ":PORT"',
            ),
        )
    ),
    (
        NETWORK,
        NAT + '[forward.shop]\nlisten = ":443"\nto = "web"\n',
        [':7: forward.shop.to: "web" names no port: write for example "web:443"'],
    ),
    (
        NETWORK,
        NAT + '[forward.a]\nlisten = ":443"\nto = "web:443"\n[forward.b]\nlisten = "10.1.1.1:443"\nto = "db:1"\n',
        [":9: forward.b.listen: tcp port 443 is taken by forward.a already (one port leads to one guest)"],
    ),
    (
        NETWORK,
        '[network]\nmode = "isolated"\n[forward.a]\nlisten = ":443"\nto = "web:443"\n',
        [
            ':3: forward.a: mode = "isolated" lets nothing in or out (mode = "nat", with guests_isolated = true if they'
            " must not see each other)"
        ],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\nbridge = "br0"\n[forward.a]\nlisten = ":443"\nto = "web:443"\n',
        [':4: forward.a: mode = "bridge": kvmd routes nothing there; guests have addresses of their own'],
    ),
    (NETWORK, NAT + '[ipv6]\nmode = "slaac"\n', [':5: ipv6.address: is required (for example address = "fd50::1/64")']),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fd50::1/80"\n',
        [
            ':6: ipv6.address: "fd50::1/80": guests can make their own addresses in a /64 only (RFC 4862, 5.5.3) (a /64, or ipv6.mode = "dhcp" or "none")'
        ],
    ),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fd50::1/60"\nmode = "dhcp"\n',
        [':6: ipv6.address: "fd50::1/60": DHCPv6 wants a prefix between /64 and /120'],
    ),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fe80::1/64"\n',
        [
            ':6: ipv6.address: "fe80::1/64" is no address of a network: take one of fd00::/8, or of what your provider gave'
        ],
    ),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fd50::/64"\n',
        [':6: ipv6.address: "fd50::/64" is the address of any router there (RFC 4291, 2.6.1); the host needs its own'],
    ),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fd50::1%eth0/64"\n',
        [':6: ipv6.address: "fd50::1%eth0/64" is not an IPv6 address with its prefix: write for example "fd50::1/64"'],
    ),
    (
        NETWORK,
        NAT.replace('"nat"', '"nat"\nmtu = 1200') + '[ipv6]\naddress = "fd50::1/64"\n',
        [":3: network.mtu: 1200 is too small for IPv6: at least 1280 (RFC 8200, 5) (a larger mtu, or no [ipv6])"],
    ),
    (
        NETWORK,
        NAT + '[dns]\nupstream = ["192.0.2.53", "fd00::g"]\n',
        [':6: dns.upstream: "fd00::g" is no address: write for example "192.0.2.53" or "2001:db8::53"'],
    ),
    (
        NETWORK,
        NAT + '[reservation.p]\nmac = "3c:2a:f4:00:00:01"\n',
        [":5: reservation.p: needs an ipv4 or an ipv6 address"],
    ),
    (
        NETWORK,
        NAT + '[ipv6]\naddress = "fd50::1/64"\n[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv6 = "fd50::9"\n',
        [':9: reservation.p.ipv6: needs [ipv6] with mode = "dhcp": nobody hands the address out'],
    ),
    (
        NETWORK,
        NAT
        + '[ipv6]\naddress = "fd50::1/64"\nmode = "dhcp"\n[reservation.p]\nmac = "3c:2a:f4:00:00:01"\nipv6 = "fd51::9"\n',
        [":10: reservation.p.ipv6: fd51::9 is outside the network's addresses fd50::1 to fd50::ffff:ffff:ffff:ffff"],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\noptions = { ntp-servr = "10.0.0.1" }\n',
        [':7: ipv4.dhcp.options.ntp-servr: "ntp-servr" is no DHCP option: did you mean "ntp-server"?'],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\noptions = { "51" = 7 }\n',
        [':7: ipv4.dhcp.options.51: "51" comes from ipv4.dhcp.lease'],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\noptions = { "53" = 7 }\n',
        [':7: ipv4.dhcp.options.53: "53" belongs to the protocol itself and cannot be set'],
    ),
    (
        NETWORK,
        NAT + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\noptions = { ntp-server = "10.0.0.1,10.0.0.2" }\n',
        [
            ':7: ipv4.dhcp.options.ntp-server: "10.0.0.1,10.0.0.2": 1 to 255 of letters, digits, spaces and ._:/@+=~*()[]- are wanted'
        ],
    ),
    (
        NETWORK,
        NAT
        + '[ipv4.dhcp]\nrange = ["10.0.0.2", "10.0.0.9"]\noptions = { ntp-server = "10.0.0.1", "42" = "10.0.0.2" }\n',
        [':7: ipv4.dhcp.options.42: "ntp-server" is option 42 too'],
    ),
    (
        NETWORK,
        NAT + '[dns]\ndomain = "lan..example"\n',
        [':6: dns.domain: "lan..example" is not a domain name: write for example "lan.example"'],
    ),
    (
        NETWORK,
        NAT.replace('"nat"', '"nat"\nvlan_filtering = "on"'),
        [':3: network.vlan_filtering: wants true or false, without quotes, for example true; this is the text "on"'],
    ),
    (GUEST, BASE + "vlan = 10\n", [":5: nic.a.vlan: only with network"]),
    (
        GUEST,
        BASE.replace('type = "user"', 'network = "lan"\nvlan = 4095'),
        [":5: nic.a.vlan: 4095 is outside 1 to 4094"],
    ),
    (
        GUEST,
        BASE.replace('type = "user"', 'network = "lan"\nvlan = 10'),
        [
            ":5: nic.a.vlan: nothing would keep the VLAN apart: the network has vlan_filtering = false (vlan_filtering = true in networks.d/lan.toml)"
        ],
    ),
    (
        GUEST,
        BASE.replace('type = "user"', 'network = "lan"\nvlan = 10\nvlans = [20, 20]\nnative_vlan = 20'),
        [
            ":5: nic.a.vlan: an access port has one VLAN, a trunk has vlans (leave out vlan or vlans)",
            ":6: nic.a.vlans: names a VLAN twice",
            ":7: nic.a.native_vlan: 20 is one of vlans too, which go with a tag",
        ],
    ),
    (
        GUEST,
        BASE.replace('type = "user"', 'network = "lan"\nnative_vlan = 20'),
        [":5: nic.a.native_vlan: only with vlans (vlan = 20 for an access port)"],
    ),
    (
        GUEST,
        BASE.replace('type = "user"', 'network = "lan"\nvlans = ["10-20"]'),
        [':5: nic.a.vlans: wants a VLAN, a number from 1 to 4094; this is the text "10-20"'],
    ),
    (
        NETWORK,
        NAT + '[uplink]\ninterface = "enp3s0"\n',
        [':5: uplink: only with mode = "bridge"; it is "nat" (nat.uplink says which way out guests take)'],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\n[uplink]\n',
        [':3: uplink.interface: is required (for example interface = "enp3s0")'],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\n[uplink]\ninterface = "a-name-of-16-chr"\n',
        [':4: uplink.interface: "a-name-of-16-chr" is not an interface name: 1 to 15 of letters, digits, _ . and -'],
    ),
    (
        NETWORK,
        '[network]\nmode = "bridge"\n[uplink]\ninterface = "enp3s0"\n[ipv4]\naddress = "10.0.0.1/24"\n',
        [":5: ipv4: the host has no part in the bridge of an [uplink]: its address would be cut off with it"],
    ),
    (NETWORK, NAT.replace('"nat"', '"nat"\nmtu = 20'), [":3: network.mtu: 20 is out of range: at least 68"]),
    (
        HOST,
        "[hugepages.2MB]\npages = 3\n",
        [':1: hugepages.2MB: "2MB" is not a page size: write [hugepages.2MiB] or [hugepages.1GiB]'],
    ),
    (
        HOST,
        '[hugepages.2MiB]\npages = "many"\n',
        [':2: hugepages.2MiB.pages: wants "auto", a number of pages or { node0 = 512 }; this is the text "many"'],
    ),
    (HOST, "[hugepages.2MiB]\npages = -1\n", [":2: hugepages.2MiB.pages: -1 is not a number of pages"]),
    (
        HOST,
        "[hugepages.2MiB]\npages = { node01 = 4 }\n",
        [':2: hugepages.2MiB.pages: "node01" is not a node: write for example node0'],
    ),
    (
        HOST,
        '[hugepages.2MiB]\nspare = "3MiB"\n',
        [':2: hugepages.2MiB.spare: "3MiB" is not a whole number of 2MiB pages'],
    ),
    (HOST, '[ksm]\nmode = "on"\n', [':2: ksm.mode: "on" is not one of "keep", "off", "kernel", "kvmd"']),
    (HOST, '[ksm]\nmax_cpu = "110%"\n', [':2: ksm.max_cpu: "110%" is not a percentage: write for example "10%"']),
    (
        HOST,
        "[ksm]\nmax_cpu = 10\n",
        [':2: ksm.max_cpu: wants a percentage in quotes, for example "10%"; this is the number 10'],
    ),
    (HOST, "[swap]\nswappiness = 201\n", [":2: swap.swappiness: 201 is outside 0 to 200"]),
    (
        HOST,
        '[swap]\nswappiness = "some"\n',
        [':2: swap.swappiness: wants a number from 0 to 200, or "keep"; this is the text "some"'],
    ),
    (HOST, '[swap.file]\npath = "/swap"\n', [':1: swap.file.size: is required (for example size = "32GiB")']),
    (HOST, '[swap.zram]\nsize = "1.5KiB"\n', [':2: swap.zram.size: "1.5KiB" is not a whole number of MiB']),
    (HOST, "[ksm]\nmin_pages = 9\nmax_pages = 8\n", [":2: ksm.min_pages: 9 is more than ksm.max_pages = 8"]),
    (HOST, '[ksm]\nsleep = "0s"\n', [':2: ksm.sleep: "0s" is outside 1ms to 1min ("20ms" is the kernel\'s default)']),
    (
        HOST,
        "[cpu]\nhousekeeping = [0, 1]\n",
        [':2: cpu.housekeeping: wants a CPU set in quotes, for example "0-3,8"; this is a list'],
    ),
    (
        HOST,
        '[cpu]\novercommit_ratio = "4"\n',
        [':2: cpu.overcommit_ratio: wants a number, for example 4.0; this is the text "4"'],
    ),
    (HOST, "[memory]\nswap_factor = 1.5\n", [":2: memory.swap_factor: 1.5 is outside 0 to 1"]),
    (
        HOST,
        '[modules]\nload = ["tun", "vfio-pci disable_vga=1"]\n',
        [
            ':2: modules.load: "vfio-pci disable_vga=1" is not a kernel module\'s name: a-z, 0-9, _ and -, '
            'for example "vhost_net"'
        ],
    ),
    (
        HOST,
        '[modules]\nload = ["-r"]\n',
        [':2: modules.load: "-r" is not a kernel module\'s name: a-z, 0-9, _ and -, for example "vhost_net"'],
    ),
    (
        HOST,
        '[passthrough]\nallow = ["0000:3b:00.1/24"]\n',
        [':2: passthrough.allow: "0000:3b:00.1/24": the span begins at 0000:3b:00.0; write "0000:3b:00.0/24"'],
    ),
    (
        HOST,
        '[passthrough]\nallow = ["0000:00:00.0/16"]\n',
        [
            ':2: passthrough.allow: "0000:00:00.0/16": a prefix from /20 to /32 is wanted (/24 a bus, /29 a device, '
            "/32 a function)"
        ],
    ),
    (HOST, "[sriov.ens1]\nvfs = -1\n", [":2: sriov.ens1.vfs: -1 is out of range: at least 0"]),
    (
        DAEMON,
        "[access]\nadmins = []\n",
        [':2: access.admins: nobody could administer kvmd (for example admins = ["root"])'],
    ),
    (DAEMON, '[access]\nadmins = ["web team"]\n', [':2: access.admins: "web team" is not a user or @group']),
    (DAEMON, '[storage]\nroots = ["/"]\n', [':2: storage.roots: "/" would let every file of the host be an image']),
    (
        DAEMON,
        '[storage]\nroots = ["srv"]\n',
        [':2: storage.roots: "srv" is not an absolute path (it must begin with /)'],
    ),
    (
        DAEMON,
        '[qemu]\nuid_range = "0-100"\n',
        [':2: qemu.uid_range: "0-100" is not a range of user ids: write for example "64100-65099"'],
    ),
    (
        DAEMON,
        '[apply]\nallow = ["everything"]\n',
        [':2: apply.allow: "everything" is not one of "guest", "network", "host"'],
    ),
    (DAEMON, "[guests]\nstart_concurrency = 0\n", [":2: guests.start_concurrency: 0 is outside 1 to 1024"]),
    (
        DAEMON,
        '[guests]\ndefault_profile = "linux"\n',
        [":2: guests.default_profile: there is no profiles.d/linux.toml"],
    ),
    (
        DAEMON,
        '[log]\nserial = "2MiB"\n',
        [':2: log.serial: is a table, not the text "2MiB": write [log.serial] and its keys below'],
    ),
    (DAEMON, '[hooks]\ndir = "/etc/kvmd/hooks.d"\n', [":2: hooks.dir: not supported yet"]),
]


@pytest.mark.parametrize(("file", "text", "messages"), CASES, ids=[case[2][0][:70] for case in CASES])
def test_message(tmp_path: Path, file: str, text: str, messages: list[str]) -> None:
    for directory in ("guests.d", "networks.d"):
        (tmp_path / directory).mkdir()
    (tmp_path / "networks.d/lan.toml").write_text('[network]\nmode = "isolated"\n')
    (tmp_path / file).write_text(text)

    loaded = load(tmp_path)

    assert [str(fault) for fault in loaded.errors] == [file + message for message in messages]
    assert loaded.faulty == {file}
    assert file not in loaded.keep


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


def test_every_fault_of_every_file_in_one_go(tmp_path: Path) -> None:
    (tmp_path / "guests.d").mkdir()
    (tmp_path / "guests.d/a.toml").write_text('[memory]\nsise = "1GiB"\nsize = 3\n[cpu]\nvcpus = "x"\n')
    (tmp_path / "guests.d/b.toml").write_text("[")
    (tmp_path / "guests.d/good.toml").write_text(BASE)
    (tmp_path / "host.toml").write_text('[ksm]\nmode = "on"\n')

    loaded = load(tmp_path)

    assert [(fault.file, fault.line) for fault in loaded.errors] == [
        ("guests.d/a.toml", 2),
        ("guests.d/a.toml", 3),
        ("guests.d/a.toml", 5),
        ("guests.d/b.toml", 1),
        ("host.toml", 2),
    ]
    assert list(loaded.desired.guests) == ["good"]
