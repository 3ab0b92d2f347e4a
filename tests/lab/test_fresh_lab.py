"""A fresh Debian 12 with nothing prepared: the README's own commands, from scripts/install to the first guest.

The packages kvmd needs are on it (what apt would fetch), its Python packages come from a directory of wheels, and the
user's image is one boot sector. All else is as an administrator meets it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.first_guest import README, first_guest_commands
from tests.rig.lab import Lab
from tests.rig.labhost import left_as_it_was, take_away

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

# The user's part: an image where the README says it is.
MAKE_IMAGE = """
cd /src/kvmd && python3 -Bc '
from pathlib import Path
from tests.rig.guestimage import bootsector
bootsector(Path("/root/web.raw"), "web is up\\n")
' && qemu-img convert -O qcow2 /root/web.raw /var/lib/kvmd/images/web.qcow2 && rm /root/web.raw
"""


@pytest.fixture
def fresh(lab_plain: Lab) -> Iterator[Lab]:
    with left_as_it_was(lab_plain):
        yield lab_plain
        take_away(lab_plain)


def test_the_readmes_commands_lead_to_a_running_guest(fresh: Lab) -> None:
    commands = first_guest_commands(README.read_text())
    assert commands[0].startswith("sudo scripts/install")
    for number, command in enumerate(commands):
        line = command.replace("sudo ", "")  # a fresh Debian has none; this is root
        fresh.check(f"cd /src/kvmd && export KVMD_WHEELS=/opt/kvmd-wheels && {line}", timeout_s=900)
        if number == 0:
            fresh.check(MAKE_IMAGE)
    fresh.wait_for("grep -q 'web is up' /var/log/kvmd/web/serial-*.log", timeout_s=60)
    assert "running" in fresh.check("kvmd-cli list", timeout_s=60)
