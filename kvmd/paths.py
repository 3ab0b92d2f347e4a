"""Where things lie. One value, made once from the command line, so that two kvmds can live on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIG_DIR = Path("/etc/kvmd")
STATE_DIR = Path("/var/lib/kvmd")
RUN_DIR = Path("/run/kvmd")
LOG_DIR = Path("/var/log/kvmd")


@dataclass(frozen=True, slots=True)
class Paths:
    """The four directories of one kvmd."""

    config: Path = CONFIG_DIR
    state: Path = STATE_DIR
    run: Path = RUN_DIR
    log: Path = LOG_DIR

    @classmethod
    def of(cls, config: Path, state: Path, run: Path, log: Path | None) -> Paths:
        """Logs go to /var/log/kvmd for the host's own kvmd, beside the state for any other."""
        return cls(config, state, run, log or (LOG_DIR if state == STATE_DIR else state / "log"))

    @property
    def directories(self) -> tuple[tuple[Path, int], ...]:
        """What kvmd makes at its start, with the mode of each, parents first."""
        return (
            (self.run, 0o755),
            (self.run / "guests", 0o711),
            (self.birth_marks, 0o700),
            (self.state, 0o700),
            (self.state / "guests", 0o700),
            (self.log, 0o750),
        )

    @property
    def api_socket(self) -> Path:
        """Where clients connect."""
        return self.run / "kvmd.sock"

    @property
    def launch_socket(self) -> Path:
        """Where launchers ask for their hand-over."""
        return self.run / "launch.sock"

    @property
    def birth_marks(self) -> Path:
        """A lock for each guest, held by whoever starts it."""
        return self.run / "standby"

    @property
    def last_good(self) -> Path:
        """Copies of every file that checked clean."""
        return self.state / "last-good"

    def guest_run(self, name: str) -> Path:
        """The guest's sockets: 0711, so that QEMU can reach its display directory and nothing else."""
        return self.run / "guests" / name

    def guest_display(self, name: str) -> Path:
        """Where QEMU itself may make a socket; 0700, owned by the guest's uid."""
        return self.guest_run(name) / "display"

    def guest_state(self, name: str) -> Path:
        """identity.toml and what else outlives a boot."""
        return self.state / "guests" / name

    def guest_log(self, name: str) -> Path:
        """serial-NAME.log and qemu.log."""
        return self.log / name
