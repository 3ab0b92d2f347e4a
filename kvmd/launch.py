"""The only place a QEMU is born: fetch what kvmd prepared, shed root, become QEMU.

Run by file path as `python3 -I -S launch.py …`, apart from the rest of kvmd: it imports `os`, `sys` and `_socket` only
(13 ms from exec to QEMU instead of 300), and nothing at all once it has dropped its uid, because the interpreter may
lie where the guest's uid cannot read.

    launch.py RUN_DIR NAME          ask RUN_DIR/launch.sock for the guest's argv and fds, then exec QEMU
    launch.py --stop RUN_DIR NAME   ask the guest to power off, wait, then quit QEMU; works without kvmd

The hand-over: we send `NAME\\n`; kvmd answers with messages of one byte, each with up to 250 fds (SCM_RIGHTS); a byte
of `.` says more follow (the first one, without fds, only that kvmd is there), `!` is the last, and `-` is a refusal
whose text follows. `stop NAME\\n` announces that the guest's unit is being stopped (`down NAME\\n`: with the host); `!`
answers it. The first fd is a memfd of NUL-terminated fields: `kvmd-launch-1`, uid, gid, groups, target fd numbers, then
argv.

When kvmd says nothing for SILENCE_S, or does not listen, RUN_DIR/standby.sock is asked the same: `kvmd/standby.py`
hands over what the guest was last started with. This process itself never opens anything of a guest: it becomes QEMU.
"""

import _socket
import os
import sys

FORMAT = "kvmd-launch-1"
FDS_PER_MESSAGE = 250  # the kernel's SCM_MAX_FD is 253
SILENCE_S = 10.0  # kvmd says at once that it is there: longer than any restart of it
ANSWER_TIMEOUT_S = 60.0  # and then may be compacting memory for hugepages
ANNOUNCE_TIMEOUT_S = 3.0
QUIT_TIMEOUT_S = 15.0
STOP_POLL_S = 0.2


def fail(text: str) -> None:
    """Say it where systemd or kvmd keeps QEMU's own last words, and leave."""
    os.write(2, ("kvmd-launch: " + text + "\n").encode())
    os._exit(1)


def receive(run_dir: str, name: str) -> list[int]:
    """All fds for this guest, the spec memfd first: from kvmd, or from its standby when kvmd is silent."""
    try:
        return ask(run_dir, "launch.sock", name, SILENCE_S)
    except OSError as error:
        said = "kvmd does not answer on " + run_dir + "/launch.sock: " + str(error)
    os.write(2, ("kvmd-launch: " + said + "; asking its standby\n").encode())
    try:
        return ask(run_dir, "standby.sock", name, ANSWER_TIMEOUT_S)
    except OSError as error:
        fail(said + "; nor does its standby: " + str(error))
        raise


def connect(peer: _socket.socket, directory: str, name: str) -> None:
    """By a descriptor of the directory, whose path may be longer than a socket's address. OSError."""
    here = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        peer.connect("/proc/self/fd/" + str(here) + "/" + name)
    finally:
        os.close(here)


def ask(run_dir: str, socket: str, name: str, patience_s: float) -> list[int]:
    """All fds that whoever listens there hands over. OSError when nobody says a word within patience_s."""
    path = run_dir + "/" + socket
    peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    peer.settimeout(patience_s)
    connect(peer, run_dir, socket)
    peer.send(name.encode() + b"\n")
    fds: list[int] = []
    mark = b""
    while mark in (b"", b"."):
        try:
            received, control, _, _ = peer.recvmsg(1, _socket.CMSG_SPACE(4 * FDS_PER_MESSAGE))
        except OSError:
            if not mark:
                leave(peer, path)
                raise
            received, control = b"", []
        if not received:
            fail(path + ": the hand-over of " + name + " was not completed")
        mark = received
        peer.settimeout(ANSWER_TIMEOUT_S)
        for level, kind, data in control:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                fds += [int.from_bytes(data[i : i + 4], sys.byteorder) for i in range(0, len(data), 4)]
    if mark == b"-":
        fail(peer.recv(4096).decode("utf-8", "replace"))
    if mark != b"!" or not fds:
        fail(path + ": what answers is no hand-over of " + name)
    return fds


def leave(peer: _socket.socket, path: str) -> None:
    """Give up on a silent peer so that it cannot answer any more: a guest is handed over once or not at all."""
    peer.shutdown(_socket.SHUT_RDWR)
    if peer.recv(1):  # it was sent before that
        fail(path + ": the answer came just when nobody waited for it any more; start the guest again")
    peer.close()


def place(fds: list[int], targets: list[int]) -> None:
    """Move each fd to its number and close every other one. Numbers may overlap: go by way of free high ones."""
    high = max(fds + targets) + 1
    for offset, fd in enumerate(fds):
        os.dup2(fd, high + offset, False)
    os.closerange(3, high)
    for offset, target in enumerate(targets):
        os.dup2(high + offset, target, True)
    os.closerange(high, high + len(fds))


def launch(run_dir: str, name: str) -> None:
    """Never returns: this process becomes QEMU."""
    spec_fd, *fds = receive(run_dir, name)
    spec = os.read(spec_fd, os.fstat(spec_fd).st_size)
    os.close(spec_fd)
    version, uid, gid, groups, numbers, *argv = spec.decode("utf-8", "surrogateescape").split("\0")[:-1]
    targets = [int(number) for number in numbers.split(",") if number]
    if version != FORMAT or len(targets) != len(fds) or not argv:
        fail("kvmd speaks another hand-over than this launcher (" + version + "): they are of different versions")
    place(fds, targets)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0, True)
    os.close(null)
    os.umask(0o077)
    os.chdir("/")
    os.setgroups([int(group) for group in groups.split(",") if group])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    try:
        os.execve(argv[0], argv, {})
    except OSError as error:
        fail("cannot run " + argv[0] + ": " + str(error))


def announce(run_dir: str, name: str, *, goes_down: bool) -> None:
    """Tell kvmd that this end is wanted, so that it is not taken for a crash; go on without it when it is away."""
    peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    peer.settimeout(ANNOUNCE_TIMEOUT_S)
    try:
        connect(peer, run_dir, "launch.sock")
        peer.send((b"down " if goes_down else b"stop ") + name.encode() + b"\n")
        peer.recv(1)
    except OSError as error:
        os.write(2, ("kvmd-launch: kvmd was not told of the stop: " + str(error) + "\n").encode())


def host_goes_down() -> bool:
    """Whether systemd is shutting the host down."""
    read_fd, write_fd = os.pipe()
    to_pipe = [(os.POSIX_SPAWN_DUP2, write_fd, 1)]
    os.posix_spawnp("systemctl", ["systemctl", "is-system-running"], os.environ, file_actions=to_pipe)
    os.close(write_fd)
    return os.read(read_fd, 64) == b"stopping\n"


def stop(run_dir: str, name: str) -> None:
    """Power the guest off through its second monitor and quit QEMU when it has, or when the time is up.

    The time is KVMD_STOP_TIMEOUT_S (seconds, default 90: systemd's own default for a stop).
    """
    import json
    import time

    if "INVOCATION_ID" in os.environ and "MAINPID" not in os.environ:
        return  # systemd runs ExecStop= after an end of QEMU's own, too (systemd.service(5))
    goes_down = "INVOCATION_ID" in os.environ and host_goes_down()
    announce(run_dir, name, goes_down=goes_down)
    patience_s = float(os.environ.get("KVMD_STOP_TIMEOUT_S", "90"))
    if os.environ.get("KVMD_AT_HOST_SHUTDOWN") == "kill" and goes_down:
        patience_s = 0.0
    monitor = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    monitor.settimeout(5)
    decoder = json.JSONDecoder()
    buffer = ""

    def ask(command: str) -> dict[str, object]:
        nonlocal buffer
        monitor.send(json.dumps({"execute": command}).encode())
        while True:
            buffer = buffer.lstrip()
            try:
                message, end = decoder.raw_decode(buffer)
            except ValueError:
                data = monitor.recv(65536)
                if not data:
                    raise OSError("QEMU closed its monitor") from None
                buffer += data.decode("utf-8", "replace")
                continue
            buffer = buffer[end:]
            if "return" in message or "error" in message:
                return dict(message)

    try:
        connect(monitor, run_dir + "/guests/" + name, "rescue.sock")
        ask("qmp_capabilities")
        if patience_s > 0:
            ask("system_powerdown")
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            answer = ask("query-status").get("return")
            if isinstance(answer, dict) and answer.get("status") == "shutdown":
                break
            time.sleep(STOP_POLL_S)
        ask("quit")
        monitor.settimeout(QUIT_TIMEOUT_S)
        while monitor.recv(65536):  # until it has written back: systemd sends SIGTERM when we return
            pass
    except OSError:
        return  # gone already: that is what was asked


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--stop":
        stop(sys.argv[2], sys.argv[3])
    elif len(sys.argv) == 3:
        launch(sys.argv[1], sys.argv[2])
    else:
        fail("usage: launch.py [--stop] RUN_DIR NAME")
