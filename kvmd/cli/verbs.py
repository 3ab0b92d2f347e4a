"""Every command of `kvmd-cli`: the one table that parsing, help, completion and the test of docs/cli.md read."""

from __future__ import annotations

from kvmd.cli.arguments import Grammar, Option, Positional, Verb

COMMON = (
    Option("--config-dir", "where the TOML files are (/etc/kvmd)", "DIR"),
    Option("--state-dir", "where the daemon keeps its state (/var/lib/kvmd)", "DIR"),
    Option("--run-dir", "where sockets are (/run/kvmd)", "DIR"),
    Option("--socket", "the daemon's socket (RUN_DIR/kvmd.sock, or $KVMD_SOCKET)", "PATH"),
    Option("--json", "print the API's answer as it is, one JSON document"),
    Option("--dry-run", "say what would be done, do nothing"),
    Option("--yes", "do not ask", short="-y"),
    Option("--no-wait", "come back when it has begun, not when it is done"),
    Option("--timeout", 'how long to wait: 30, "30s", "3min"', "TIME"),
    Option("--help", "about a command", short="-h"),
    Option("--version", "the version of this client"),
)

_GUEST = Positional("NAME", of="guest")
_GUESTS = Positional("NAME", of="guest", many=True)
_NETWORK = Positional("NETWORK", of="network")
_FORCE = Option("--force", "when the guest does not obey in time, pull the plug: may lose data")
_FOLLOW = Option("--follow", "go on showing what comes", short="-f")

_FILES = (
    Verb("init", "files", "write a NAT network and commented examples where there are none", "kvmd.cli.create:init",
         changes=True, offline=True),
    Verb("create", "files", "write a guest's file from an image or a kernel", "kvmd.cli.create:create",
         (Positional("NAME", of="name"),),
         (
             Option("--image", "the disk image", "FILE"),
             Option("--format", "of the image; else what its first bytes say", "FORMAT", choices=("qcow2", "raw")),
             Option("--cdrom", "a CD image", "FILE"),
             Option("--kernel", "boot this kernel instead of a disk", "FILE"),
             Option("--initrd", "with this initial RAM disk", "FILE"),
             Option("--cmdline", "and this kernel command line", "TEXT"),
             Option("--memory", "1GiB", "SIZE"),
             Option("--vcpus", "1", "N"),
             Option("--network", "a name in networks.d; without it user-mode NAT", "NETWORK"),
             Option("--accel", "kvm", "ACCEL", choices=("kvm", "tcg", "auto")),
             Option("--description", "for people", "TEXT"),
             Option("--auto", "start it with the host"),
         ), changes=True, offline=True),
    Verb("edit", "files", "edit a guest's file; what does not check is not kept", "kvmd.cli.edit:edit", (_GUEST,),
         changes=True, offline=True),
    Verb("set", "files", "set one key of a guest's file, comments kept", "kvmd.cli.edit:set_value",
         (_GUEST, Positional("KEY", of="key"), Positional("VALUE", optional=True)),
         (Option("--unset", "remove the key"),), changes=True, offline=True),
    Verb("check", "files", "everything that is wrong with the files", "kvmd.cli.offline:check",
         (Positional("DIR", of="directory", optional=True),), offline=True),
    Verb("import qemu", "files", "a QEMU command line, or a script that holds one, as a guest's file",
         "kvmd.cli.importer:qemu", (Positional("FILE", many=True, optional=True),),
         (
             Option("--name", "the guest's name; else what -name says", "NAME"),
             Option("--dialect", "whose defaults count; else by the program's name", "DIALECT",
                    choices=("qemu", "qemu-kvm")),
             Option("--write", "write guests.d/NAME.toml instead of printing it"),
         ), changes=True, offline=True),
    Verb("plan", "files", "what apply would do, and why; exits 10 when there is something", "kvmd.cli.passes:plan",
         (), (Option("--reboot", "what a reboot of the host would change instead"),)),
    Verb("apply", "files", "make host and guests as the files say, after asking", "kvmd.cli.passes:apply", (),
         (Option("--prune", "also remove what no file mentions any more"),), changes=True),
    Verb("reconcile", "files", "the same for cron: only what disturbs nobody", "kvmd.cli.passes:reconcile", (),
         (Option("--quiet", "say only what failed", short="-q"),), changes=True),
    Verb("status", "files", "how kvmd is: guests, networks, faults, drift", "kvmd.cli.host:status"),
    Verb("explain", "files", "where each value of a guest comes from", "kvmd.cli.look:explain", (_GUEST,)),
)  # fmt: skip

_GUEST_VERBS = (
    Verb("list", "guests", "all guests", "kvmd.cli.guests:list_guests", (), (Option("--all", "", hidden=True),)),
    Verb("show", "guests", "all about one guest", "kvmd.cli.guests:show", (_GUEST,)),
    Verb("start", "guests", "bring guests to running", "kvmd.cli.guests:start", (_GUESTS,), changes=True),
    Verb("stop", "guests", "ask guests to power off; exits 7 if one does not obey", "kvmd.cli.guests:stop", (_GUESTS,),
         (_FORCE,), changes=True),
    Verb("kill", "guests", "pull the plug", "kvmd.cli.guests:kill", (_GUESTS,), changes=True),
    Verb("reboot", "guests", "ask a guest to reboot itself, in the same QEMU", "kvmd.cli.guests:reboot", (_GUESTS,),
         changes=True),
    Verb("reset", "guests", "press the reset button", "kvmd.cli.guests:reset", (_GUESTS,), changes=True),
    Verb("restart", "guests", "stop, then start: a new QEMU, with the present file", "kvmd.cli.guests:restart",
         (_GUESTS,), (_FORCE,), changes=True),
    Verb("enable", "guests", "start guests with the host", "kvmd.cli.standing:enable", (_GUESTS,), changes=True),
    Verb("disable", "guests", "start guests with the host no more", "kvmd.cli.standing:disable", (_GUESTS,),
         changes=True),
    Verb("hold", "guests", "keep automatic hands off guests", "kvmd.cli.standing:hold", (_GUESTS,),
         (Option("--reason", "for those who wonder", "TEXT"),), changes=True),
    Verb("unhold", "guests", "lift that", "kvmd.cli.standing:unhold", (_GUESTS,), changes=True),
    Verb("wait", "guests", "until guests are off, or running", "kvmd.cli.standing:wait", (_GUESTS,),
         (Option("--for", "stopped", "STATE", choices=("running", "stopped")),)),
)  # fmt: skip

_LOOKING = (
    Verb("why", "looking", "what happened to a guest, and who asked for it", "kvmd.cli.standing:why", (_GUEST,)),
    Verb("logs", "looking", "what a guest wrote to its serial ports", "kvmd.cli.logs:logs", (_GUEST,),
         (
             Option("--serial", "only this serial port", "PORT"),
             Option("--qemu", "what its QEMU said instead"),
             Option("--lines", "only the last N", "N", short="-n"),
             _FOLLOW,
         )),
    Verb("events", "looking", "what happened, and who asked for it", "kvmd.cli.events:events",
         (Positional("NAME", of="guest", optional=True),),
         (Option("--since", 'a cursor, or a time ago: "2h"', "WHEN"), _FOLLOW)),
    Verb("console", "looking", "a terminal on the guest's serial port; ^] leaves it", "kvmd.cli.console:console",
         (_GUEST,), (Option("--serial", "another port than console", "PORT"),)),
    Verb("argv", "looking", "the command line QEMU got, an option per line", "kvmd.cli.look:argv", (_GUEST,)),
)  # fmt: skip

_HOST = (
    Verb("host facts", "host", "the host as it is, read now", "kvmd.cli.host:facts"),
    Verb("host cpus", "host", "who sits where: CPUs, their roles, guests' threads", "kvmd.cli.cpus:cpus"),
    Verb("host hugepages", "host", "pools by size and node, who wants pages", "kvmd.cli.hugepages:hugepages"),
    Verb("host kernel-args", "host", "the kernel's command line: there, wanted, missing", "kvmd.cli.kernelargs:show",
         (), (Option("--write", "write kvmd's drop-in for the boot loader"),
          Option("--remove", "take that drop-in away"),
          Option("--update", "with either: run update-grub afterwards"))),
    Verb("host release", "host", "put the host back as it was before kvmd", "kvmd.cli.host:release", (),
         (Option("--partial", "only what no running guest needs"),), changes=True),
    Verb("network list", "host", "all networks and whether they are there", "kvmd.cli.network:list_networks"),
    Verb("network show", "host", "who is on a network, what it gives out, what is wrong", "kvmd.cli.network:show",
         (_NETWORK,)),
    Verb("network leases", "host", "the addresses DHCP servers have given out", "kvmd.cli.network:leases",
         (Positional("NETWORK", of="network", optional=True),)),
    Verb("network confirm", "host", "the NIC put into the network's bridge stays there", "kvmd.cli.network:confirm",
         (_NETWORK,), changes=True),
    Verb("tune status", "host", "the tuning agent's present picture", "kvmd.cli.tune:status"),
    Verb("tune explain", "host", "the agent's decisions about a guest, with reasons", "kvmd.cli.tune:explain",
         (_GUEST,), (Option("--limit", "how many decisions (20)", "N"),)),
    Verb("doctor", "host", "what this host lacks, line by line, with a fix", "kvmd.cli.offline:doctor", offline=True),
    Verb("version", "host", "of this client and of the daemon", "kvmd.cli.host:version"),
    Verb("help", "host", "about a command, or all", "kvmd.cli.help:show",
         (Positional("COMMAND", many=True, optional=True),), offline=True),
    Verb("completion", "host", "bash's completion script", "kvmd.cli.completion:completion",
         (Positional("SHELL", optional=True),)),
)  # fmt: skip

VERBS = {verb.name: verb for verb in (*_FILES, *_GUEST_VERBS, *_LOOKING, *_HOST)}
GROUPS = {"files": "Files", "guests": "Guests", "looking": "Looking", "host": "Host"}

# virsh's words, where they mean exactly the same.
ALIASES = {"shutdown": "stop", "destroy": "kill", "dominfo": "show", "nodeinfo": "host facts"}

# Names that are taken: they will mean what architecture says, and nothing before that.
LATER = frozenset({
    "health", "suspend", "resume", "save", "delete", "clone",
    "rename", "release", "monitor", "screenshot", "ip", "stats", "top", "graph", "disk", "nic", "image",
    "backup", "restore", "import running", "import libvirt", "import proxmox",
    "import bundle", "export", "capabilities", "job", "db",
    "host drain", "host undrain", "tune advise", "tune record", "tune replay", "tune simulate",
})  # fmt: skip

GRAMMAR = Grammar(VERBS, ALIASES, LATER, COMMON)
