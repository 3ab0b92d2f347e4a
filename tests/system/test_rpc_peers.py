"""Who the kernel says is calling: real processes under real uids."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.rpc.auth import Access, Role
from kvmd.rpc.peers import find_group, find_user, observe_peer
from tests.rig.rpcserver import serving

NOBODY = 65534

# A client in a process of its own: connects as one uid, may become another, then asks. Standard library only, because
# other uids may not be able to read this project.
CLIENT = """
import os, socket, sys
path, first, groups, then, request = sys.argv[1:6]
os.setgroups([int(g) for g in groups.split(",") if g])
os.setresuid(int(first), int(first), 0)
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
os.setresuid(0, 0, 0)
os.setresuid(int(then), int(then), int(then))
try:
    sock.sendall(request.encode() + b"\\n")
except BrokenPipeError:
    pass
print(sock.recv(65536).decode(), end="")
"""
PING = '{"jsonrpc":"2.0","id":1,"method":"daemon.ping"}'


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every uid may enter."""
    made = Path(tempfile.mkdtemp(prefix="kvmd-rpc-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


async def ask_as(path: Path, connect_uid: int, *, groups: str = "", then_uid: int | None = None) -> str:
    uid = connect_uid if then_uid is None else then_uid
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", CLIENT, str(path), str(connect_uid), groups, str(uid), PING,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await child.communicate()
    assert child.returncode == 0
    return output.decode()


def test_this_process_is_its_own_peer() -> None:
    one, other = socket.socketpair()
    with one, other:
        peer = observe_peer(one)
    assert (peer.uid, peer.pid) == (os.getuid(), os.getpid())
    assert peer.gids == {os.getgid(), *os.getgroups()}


def test_more_groups_than_the_kernel_tells_python_come_from_the_database() -> None:
    class Crowded(socket.socket):
        """A peer in more than 256 groups."""

        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
            if option == 59:
                raise OSError(34, "Numerical result out of range")
            return super().getsockopt(level, option, size)

    one, other = socket.socketpair()
    with Crowded(fileno=one.detach()) as crowded, other:
        peer = observe_peer(crowded)
    assert peer.uid == os.getuid()
    assert os.getgid() in peer.gids


def test_names() -> None:
    assert find_user("root") == 0
    assert find_group("root") == 0
    assert find_user("no-such-user-here") is None
    assert find_group("no-such-group-here") is None


@pytest.mark.system
async def test_another_user_is_turned_away_and_let_in_by_the_lists(public: Path) -> None:
    async with serving(public) as rig:
        assert '"slug":"denied"' in await ask_as(rig.path, NOBODY)
        assert rig.actors == []
        rig.server.set_access(Access(uids={NOBODY: Role.VIEWER}, names={NOBODY: "nobody"}))
        assert '"result"' in await ask_as(rig.path, NOBODY)
        assert rig.actors == ["nobody"]


@pytest.mark.system
async def test_a_supplementary_group_counts(public: Path) -> None:
    async with serving(public, access=Access(gids={4242: Role.VIEWER})) as rig:
        assert '"result"' in await ask_as(rig.path, NOBODY, groups="17,4242,99")
        assert '"slug":"denied"' in await ask_as(rig.path, NOBODY, groups="17,99")


@pytest.mark.system
async def test_what_a_client_becomes_after_connecting_changes_nothing(public: Path) -> None:
    async with serving(public) as rig:
        assert '"result"' in await ask_as(rig.path, 0, then_uid=NOBODY)
        assert '"slug":"denied"' in await ask_as(rig.path, NOBODY, then_uid=0)
