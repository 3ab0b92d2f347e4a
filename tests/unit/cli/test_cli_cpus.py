"""How `host cpus` draws: like cores together, every holder in sight, nothing a terminal would obey."""

from __future__ import annotations

from typing import Any

from kvmd.cli.cpus import draw


def cpu(number: int, core: int | None, *roles: str, vcpus: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    place = {"node": 0, "package": 0, "l3": 0, "capacity": 1024} if core is not None else dict.fromkeys(
        ("node", "package", "l3", "capacity")
    )  # fmt: skip
    return {"id": number, **place, "core": core, "roles": roles, "vcpus": vcpus, **more}


def guest(name: str, **more: Any) -> dict[str, Any]:
    shown = {
        "name": name, "placement": "dedicated", "nodes": None, "vcpus": ["2", "6"],
        "threads": [{"name": "qemu", "cpus": "0,4"}, {"name": "vhost-7", "cpus": "0,4"}],
        "wanted_vcpus": ["2", "6"], "wanted_others": "0,4", "placed": True,
    }  # fmt: skip
    return shown | more


def answer(**more: Any) -> dict[str, Any]:
    cpus = [
        cpu(0, 0, "housekeeping"), cpu(4, 0, "housekeeping"),
        cpu(1, 1, "isolated", vcpus=("web:1",)), cpu(5, 1, vcpus=("web:0", "db:0")),
        cpu(2, 2), cpu(6, 2), cpu(3, 3), cpu(7, 3),
        cpu(8, 8, node=1, l3=8), cpu(9, None, "offline"), cpu(10, None, "offline"),
    ]  # fmt: skip
    return {"housekeeping": "0,4", "cpus": cpus, "guests": [], "interrupts": [], "problems": [], **more}


def test_the_table() -> None:
    lines = [line.split() for line in draw(answer()).splitlines()]
    assert lines == [
        ["NODE", "L3", "CORES", "CPUS", "ROLE", "VCPUS"],
        ["0", "0", "0", "0,4", "housekeeping", "-"],
        ["1", "1,5", "1:", "isolated,", "5:", "ordinary", "1=web:1", "5=web:0+db:0"],
        ["2", "cores", "2-3,6-7", "-", "-"],
        ["1", "8", "8", "8", "-", "-"],
        ["-", "-", "-", "9-10", "offline", "-"],
    ]


def test_speeds_are_a_column_where_they_differ() -> None:
    hybrid = answer()
    hybrid["cpus"][8] = cpu(8, 8, node=1, l3=8, capacity=512)
    text = draw(hybrid)
    assert "SPEED" in text.splitlines()[0]
    assert "50 %" in text
    assert "SPEED" not in draw(answer())


def test_guests_and_problems() -> None:
    found = answer(
        guests=[
            guest("web"),
            guest("db", placement="shared", vcpus=["0-7", "0-7"], placed=False),
            guest("big", wanted_vcpus=None, placed=False),
            guest("evil\x1b[2J", placement="", vcpus=[], threads=[], placed=False),
        ],
        problems=[{"subject": "guest big", "message": "wants 9", "hint": "cpu.vcpus = 4", "guests": ["big"]}],
    )
    rows = {line.split()[0]: line.split()[1:] for line in draw(found).splitlines() if line}
    assert rows["web"] == ["dedicated", "2", "6", "0,4", "placed"]
    assert rows["db"] == ["shared", "0-7", "0,4", "to", "be", "pinned"]
    assert rows["big"][-1] == "refused"
    assert "! guest big: wants 9\n  cpu.vcpus = 4" in draw(found)
    assert "\x1b" not in draw(found)
    assert "\x1b[31mrefused" in draw(found, on=True)


def test_interrupts_by_where_they_arrive() -> None:
    def irq(number: int, arrives: str, *, kept: bool = False) -> dict[str, Any]:
        return {"number": number, "device": f"eth0-{number}", "cpus": "0-7", "arrives": arrives, "kept": kept}

    found = answer(interrupts=[irq(24, "0"), irq(25, "0"), irq(26, "0"), irq(27, "0"), irq(40, "2", kept=True)])
    assert [line.split() for line in draw(found).splitlines()[-3:]] == [
        ["ARRIVE", "AT", "INTERRUPTS", "DEVICES", "KEPT"],
        ["0", "24-27", "eth0-24,", "eth0-25,", "eth0-26", "and", "1", "more", "-"],
        ["2", "40", "eth0-40", "the", "kernel's"],
    ]
