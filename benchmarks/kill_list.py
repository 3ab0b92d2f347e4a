"""How soon guest.kill is answered, and what `kvmd-cli list` of 100 guests takes as a process.

Bare sides: SIGKILL and wait for the same QEMU; `python -I -c pass`, the least any Python command can take; virsh list
where libvirt is installed and answers.

    python -m benchmarks.kill_list
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.bare import Bare
from benchmarks.harness import Series, begin, bench_host, environment, options, verdict

KILL_MS = 30.0
LIST_MS = 60.0
VIRSH_PUBLISHED_MS = 65.0
CONSOLE_SCRIPT = "import sys; from kvmd.cli.main import main; sys.exit(main())"  # what an installed kvmd-cli runs


def main() -> None:
    """Both figures."""
    chosen = options(__doc__, guests=100, rounds=20)
    begin(f"kill of one guest; list of {chosen.guests}")
    with bench_host() as host:
        names = host.boot_guests(chosen.guests)
        host.start()
        kill, bare_kill = Series("guest.kill answered"), Series("bare QEMU killed and reaped")
        bare = Bare(host)
        with host.client() as client:
            for _ in range(chosen.rounds):
                client.call("guest.start", {"name": names[0]})
                kill.time(lambda: client.call("guest.kill", {"name": names[0]}))
                argv, descriptors = bare.prepare(names[0])
                qemu = bare.start(names[0], argv, descriptors)
                descriptors.close()
                bare_kill.time(qemu.end)
        listing, nothing = Series(f"kvmd-cli list, {chosen.guests} guests"), Series("python -I -c pass")
        command = [sys.executable, "-c", CONSOLE_SCRIPT, "--run-dir", str(host.run), "list"]
        for _ in range(chosen.rounds):
            listing.time(lambda: run(command))
            nothing.time(lambda: run([sys.executable, "-I", "-c", "pass"]))
        virsh = virsh_list(chosen.rounds)
    for series in (kill, bare_kill, listing, nothing, *([virsh] if virsh else [])):
        print(series.line())
    print(f"  kill: {kill.median / bare_kill.median:.2f} x bare; list: {listing.median / nothing.median:.2f} x python")
    if virsh:
        print(f"  list: {listing.median / virsh.median:.2f} x virsh list, measured here")
    else:
        ratio = listing.median * 1e3 / VIRSH_PUBLISHED_MS
        print(f"  list: {ratio:.2f} x the published {VIRSH_PUBLISHED_MS:g} ms of virsh, which was not measured here")
    verdict("guest.kill, median", kill.median * 1e3, KILL_MS, "ms")
    verdict("kvmd-cli list, median", listing.median * 1e3, LIST_MS, "ms")


def run(command: list[str]) -> None:
    """A process from exec to its end; its output is taken as a terminal would."""
    subprocess.run(command, env=environment(), cwd="/", check=True, stdout=subprocess.DEVNULL)


def virsh_list(rounds: int) -> Series | None:
    """virsh's own time, None where it is not there or has no libvirtd."""
    virsh = shutil.which("virsh")
    if not virsh or subprocess.run([virsh, "list", "--all"], capture_output=True, check=False).returncode:
        return None
    series = Series("virsh list --all")
    for _ in range(rounds):
        series.time(lambda: run([virsh, "list", "--all"]))
    return series


if __name__ == "__main__":
    main()
