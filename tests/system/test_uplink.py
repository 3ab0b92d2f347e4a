"""A NIC put into kvmd's bridge: on trial, confirmed, undone, also by a kvmd that was not there at the deadline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvmd.rpc.client import RemoteError
from tests.rig.kvmdhost import KvmdHost, kvmd_host
from tests.rig.netns import Namespace, private_namespace, veth

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

DMZ = """
[network]
mode = "bridge"
bridge = "kvdmz"
[uplink]
interface = "card0"
rollback = "{rollback}"
"""


@pytest.fixture
def host() -> Iterator[KvmdHost]:
    """A host with a spare NIC, `card0`, whose cable leads to another machine."""
    with kvmd_host() as found:
        assert found.namespace
        with private_namespace("switch") as switch:
            veth(Namespace(found.namespace), "card0", switch, "eth0")
            Namespace(found.namespace).ip("link set card0 down")
            yield found


def link(host: KvmdHost, name: str = "card0") -> dict[str, Any]:
    (found,) = json.loads(host.inside("ip", "-j", "link", "show", name).stdout)
    return dict(found)


def master(host: KvmdHost) -> str | None:
    return link(host).get("master")


def apply(host: KvmdHost) -> list[str]:
    done = host.call("host.apply", allow=["network"])
    assert not [one for one in done["outcomes"] if one["error"]]
    return [one["line"] for one in done["outcomes"]]


def wait_out(host: KvmdHost, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while master(host) is not None:
        assert time.monotonic() < deadline, host.log.read_text()[-3000:]
        time.sleep(0.05)


def state(host: KvmdHost) -> str | None:
    found = host.call("network.show", name="dmz")["uplink_state"]
    return None if found is None else str(found)


def test_on_trial_then_confirmed_then_a_requirement(host: KvmdHost) -> None:
    host.network("dmz", DMZ.format(rollback="60s"))
    host.start()
    assert master(host) is None, "boot disturbs nobody"
    assert apply(host) == ["+ uplink card0 into kvdmz, taken out again in 60 s unless confirmed"]
    assert (master(host), "UP" in link(host)["flags"], state(host)) == ("kvdmz", True, "trial")
    assert host.inside("cat", "/proc/sys/net/ipv6/conf/kvdmz/disable_ipv6").stdout == "1\n"
    assert any("network confirm dmz" in problem["hint"] for problem in host.call("host.plan")["problems"])
    assert host.cli("network", "confirm", "dmz").stdout == "the uplink of network dmz stays\n"
    assert host.call("network.confirm", name="dmz") == {"network": "dmz", "changed": False}
    assert host.call("host.plan")["problems"] == [] and state(host) == "kept"
    host.inside("ip", "link", "set", "card0", "nomaster")
    # kvmd may have seen that itself already.
    host.call("host.reconcile")
    assert master(host) == "kvdmz", "what was confirmed is put back by any pass"
    host.restart()
    assert (master(host), state(host)) == ("kvdmz", "kept")
    done = host.call("host.release")
    assert done["restored"][:1] == ["- uplink card0 out of kvdmz"] and done["kept"] == []
    assert master(host) is None and "UP" not in link(host)["flags"], "down, as it was before"


def test_without_a_word_it_is_taken_out_again(host: KvmdHost) -> None:
    host.network("dmz", DMZ.format(rollback="2s"))
    host.start()
    apply(host)
    assert master(host) == "kvdmz"
    wait_out(host)
    assert "UP" not in link(host)["flags"]
    assert state(host) == "undone"
    with pytest.raises(RemoteError, match="no uplink on trial"):
        host.call("network.confirm", name="dmz")
    host.call("host.reconcile")
    assert master(host) is None, "cron does not try again"
    assert any("nobody confirmed" in problem["message"] for problem in host.call("host.plan")["problems"])
    host.call("host.apply", allow=[])  # a person asks again
    assert apply(host)[-1].startswith("+ uplink card0 into kvdmz")
    host.call("network.confirm", name="dmz")
    assert state(host) == "kept"


def test_a_kvmd_that_was_killed_undoes_it_when_it_comes_back(host: KvmdHost) -> None:
    host.network("dmz", DMZ.format(rollback="2s"))
    host.start()
    apply(host)
    host.kill()
    time.sleep(2.2)  # nobody is there at the deadline
    assert master(host) == "kvdmz"
    host.start()
    wait_out(host)
    assert state(host) == "undone"


def test_a_nic_with_an_address_is_never_touched(host: KvmdHost) -> None:
    host.inside("ip", "addr", "add", "192.0.2.5/24", "dev", "card0")
    host.network("dmz", DMZ.format(rollback="60s"))
    host.start()
    assert apply(host) == []
    (problem,) = host.call("host.plan")["problems"]
    assert "192.0.2.5/24" in problem["message"] and master(host) is None


def test_without_its_file_the_nic_is_free_again(host: KvmdHost) -> None:
    host.network("dmz", DMZ.format(rollback="0s"))
    host.start()
    assert apply(host)[-1] == "+ uplink card0 into kvdmz"
    (host.config / "networks.d/dmz.toml").unlink()
    host.network("other", '[network]\nmode = "isolated"\n')
    assert apply(host)[-2:] == ["- uplink card0 out of kvdmz", "- bridge kvdmz"]
    assert master(host) is None
