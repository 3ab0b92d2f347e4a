"""Drop-ins and boot links: each line for its key, none where the template is enough, the second plan empty."""

from __future__ import annotations

import configparser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.actions import Disruption, EnableGuest, WriteDropIn
from kvmd.config.guest import Guest
from kvmd.facts import Facts, GuestLife, GuestUnit
from kvmd.plan.units import drop_in, plan_units


def guest(**tables: Any) -> Guest:
    return Guest.model_validate({"machine": {"default_nic": False}, "memory": {"size": "1GiB"}} | tables)


def sections(text: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_template_is_enough_for_most() -> None:
    assert drop_in("web", guest()) == ""
    assert drop_in("web", guest(nic={"lan": {"network": "lan"}}, display={"type": "vnc"})) == ""


def test_every_line_says_its_key() -> None:
    text = drop_in(
        "web",
        guest(
            start={"after": ["nas"]},
            stop={"timeout": "30s", "at_host_shutdown": "kill"},
            nic={"out": {"type": "user"}},
            memory={"size": "1GiB", "guaranteed": "256MiB"},
            limits={
                "memory_max": "2GiB",
                "cpu_weight": 200,
                "io_weight": 300,
                "tasks_max": 99,
                "oom_score_adjust": -500,
            },
        ),
    )
    assert text == (
        "# Written by kvmd from guests.d/web.toml and replaced whenever that changes."
        " Yours: another file beside this.\n"
        "\n[Unit]\n"
        "# start.after\nAfter=kvmd-guest@nas.service\n"
        "\n[Service]\n"
        "# stop.timeout\nEnvironment=KVMD_STOP_TIMEOUT_S=30\nTimeoutStopSec=50s\n"
        "# stop.at_host_shutdown\nEnvironment=KVMD_AT_HOST_SHUTDOWN=kill\n"
        "# nic.out.type\nPrivateNetwork=no\nIPAddressDeny=\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n"
        "# memory.guaranteed\nMemoryLow=268435456\n"
        "# limits.memory_max\nMemoryMax=2147483648\n"
        "# limits.cpu_weight\nCPUWeight=200\n"
        "# limits.io_weight\nIOWeight=300\n"
        "# limits.tasks_max\nTasksMax=99\n"
        "# limits.oom_score_adjust\nOOMScoreAdjust=-500\n"
    )


@pytest.mark.parametrize(
    ("tables", "opened"),
    [
        ({"machine": {}}, True),  # QEMU's default: one user-mode NIC
        ({"machine": {"default_nic": False}}, False),
        ({"nic": {"a": {"network": "lan"}, "b": {"type": "user"}}}, True),
        ({"nic": {"a": {"network": "lan"}}}, False),
    ],
)
def test_the_network_is_open_for_user_mode_only(tables: dict[str, Any], opened: bool) -> None:
    service = sections(drop_in("web", guest(**tables))).get("Service", {})
    assert (service.get("PrivateNetwork") == "no") is opened


def test_links_follow_start_auto_and_nothing_else() -> None:
    guests = {"on": guest(start={"auto": True}), "off": guest(start={"auto": False}), "free": guest()}
    facts = Facts(units=(GuestUnit("off", enabled=True), GuestUnit("free", enabled=True)))
    assert plan_units(guests, facts, prune=True) == (
        EnableGuest(guest="off", on=False, why="start.auto = false"),
        EnableGuest(guest="on", on=True, why="start.auto = true"),
    )
    assert plan_units(guests, Facts(), prune=True) == ()  # no units here


def test_a_drop_in_that_is_not_needed_any_more_goes() -> None:
    facts = Facts(units=(GuestUnit("web", drop_in="old"),))
    (action,) = plan_units({"web": guest()}, facts, prune=False)
    assert isinstance(action, WriteDropIn)
    assert (action.text, action.disruption) == ("", Disruption.NONE)


def test_what_is_left_of_a_guest_whose_file_is_gone_goes_by_pruning_once_it_is_off() -> None:
    left = (GuestUnit("gone", drop_in="x", enabled=True),)
    assert plan_units({}, Facts(units=left), prune=False) == ()
    alive = (GuestLife("gone", alive=True, wanted=True),)
    assert plan_units({}, Facts(units=left, lives=alive), prune=True) == ()
    lines = [action.line() for action in plan_units({}, Facts(units=left), prune=True)]
    assert lines == ["- guest gone: start with the host", "- guest gone: drop-in of its unit"]


GUESTS = st.dictionaries(
    st.sampled_from(["a", "b", "c-1"]),
    st.builds(
        lambda auto, user, weight, timeout: guest(
            **({"start": {"auto": auto}} if auto is not None else {}),
            nic={"n": {"type": "user"}} if user else {},
            limits={"cpu_weight": weight} if weight else {},
            stop={"timeout": f"{timeout}s"},
        ),
        st.none() | st.booleans(),
        st.booleans(),
        st.none() | st.integers(1, 10000),
        st.integers(1, 400),
    ),
)


@given(
    guests=GUESTS,
    units=st.lists(
        st.builds(GuestUnit, st.sampled_from(["a", "b", "c-1", "x"]), st.sampled_from(["", "junk"]), st.booleans()),
        unique_by=lambda unit: unit.guest,
    ),
    prune=st.booleans(),
)
def test_a_second_plan_is_empty_and_order_is_irrelevant(
    guests: dict[str, Guest], units: list[GuestUnit], prune: bool
) -> None:
    first = plan_units(guests, Facts(units=tuple(units)), prune=prune)
    shuffled = plan_units(dict(reversed(guests.items())), Facts(units=tuple(reversed(units))), prune=prune)
    assert shuffled == first
    there = {unit.guest: unit for unit in units}
    for action in first:
        old = there.get(action.guest, GuestUnit(action.guest))  # type: ignore[attr-defined]
        match action:
            case WriteDropIn():
                there[old.guest] = GuestUnit(old.guest, action.text, old.enabled)
            case EnableGuest():
                there[old.guest] = GuestUnit(old.guest, old.drop_in, action.on)
    assert plan_units(guests, Facts(units=tuple(there.values())), prune=prune) == ()


def test_a_device_of_the_host_opens_vfio_and_locks_all_memory() -> None:
    text = drop_in("web", guest(hostdev={"gpu": {"pci": "0000:3b:00.0"}}))
    assert text.endswith(
        "\n[Service]\n# hostdev.gpu\nBindPaths=/dev/vfio\nDeviceAllow=/dev/vfio/vfio rw\nDeviceAllow=char-vfio rw\n"
        "LimitMEMLOCK=2147483648\n"
    )
    assert "# nic.fast\n" in drop_in("web", guest(nic={"fast": {"type": "vf", "pool": "ens1"}}))
