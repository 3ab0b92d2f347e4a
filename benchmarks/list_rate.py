"""How many guest.list answers of 100 guests a second one client gets, one call at a time.

The other side is the same socket and client code against a bare echo of an answer of the same size in C-speed Python:
what a Unix socket and json.loads alone allow here.

    python -m benchmarks.list_rate
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

from benchmarks.harness import begin, bench_host, options, verdict
from kvmd.rpc.client import Client

RATE = 2600.0
ROUND_S = 2.0


def main() -> None:
    """Declared guests are enough: the answer has the same shape whether they run or not."""
    chosen = options(__doc__, guests=100, rounds=5)
    begin(f"guest.list of {chosen.guests} to one client")
    raw, parsed, echo = [], [], []
    with bench_host() as host:
        host.boot_guests(chosen.guests)
        host.start()
        path = host.run / "kvmd.sock"
        answer = ask_once(path)
        print(f"  an answer has {len(answer)} bytes")
        for _ in range(chosen.rounds):
            raw.append(raw_rate(path))
            parsed.append(client_rate(path))
            echo.append(echo_rate(answer))
    for what, rates in (("kvmd, bytes read", raw), ("kvmd, by the client, parsed", parsed), ("bare echo", echo)):
        print(f"  {what:<30} best {max(rates):7.0f}/s   median {sorted(rates)[len(rates) // 2]:7.0f}/s")
    print(f"  ratio to the echo {sorted(raw)[len(raw) // 2] / sorted(echo)[len(echo) // 2]:.2f}")
    verdict("answers to one client, median", sorted(raw)[len(raw) // 2], RATE, "/s", at_least=True)


QUESTION = b'{"jsonrpc":"2.0","id":1,"method":"guest.list"}\n'


def ask_once(path: Path) -> bytes:
    """One answer."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.fspath(path))
        return exchange(peer)


def exchange(peer: socket.socket) -> bytes:
    """One question and its line."""
    peer.send(QUESTION)
    parts = [peer.recv(1 << 18)]
    while not parts[-1].endswith(b"\n"):
        parts.append(peer.recv(1 << 18))
    return b"".join(parts)


def raw_rate(path: Path) -> float:
    """Answers a second, read and not parsed, as a client in C would."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.fspath(path))
        return _rate(lambda: exchange(peer))


def client_rate(path: Path) -> float:
    """Answers a second through kvmd's own client, parsed."""
    with Client(path, 10) as client:
        return _rate(lambda: client.call("guest.list", {}))


def echo_rate(answer: bytes) -> float:
    """A thread that answers each line with the same bytes."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = Path(directory) / "echo.sock"
        listener.bind(os.fspath(path))
        listener.listen(1)
        child = os.fork()
        if child == 0:
            peer, _ = listener.accept()
            while peer.recv(4096):
                peer.sendall(answer)
            os._exit(0)
        rate = raw_rate(path)
        os.waitpid(child, 0)
        return rate


def _rate(call: object) -> float:
    assert callable(call)
    count, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) - begun < ROUND_S:
        call()
        count += 1
    return count / (now - begun)


if __name__ == "__main__":
    main()
