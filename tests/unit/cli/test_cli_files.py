"""Commands that need no daemon, on directories of files: check, init, create, set, edit, logs."""

from __future__ import annotations

import io
import json
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.cli import offline
from kvmd.cli.create import EXAMPLES
from kvmd.cli.main import main
from kvmd.config.load import check

WEB = """\
# the shop
[machine]
accel = "tcg"
default_nic = false

[memory]
size = "1GiB"  # enough

[cpu]
vcpus = 2
"""
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one guest."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    root = tmp_path / "etc"
    for name in ("guests.d", "networks.d", "profiles.d"):
        (root / name).mkdir(parents=True)
    (root / "guests.d/web.toml").write_text(WEB)
    return root


def cli(etc: Path, *words: str) -> int:
    return main(["--config-dir", str(etc), "--state-dir", str(etc.parent / "state"), *words])


class TestCheck:
    def test_nothing_wrong(self, etc: Path, capsys: Captured) -> None:
        assert cli(etc, "check") == 0
        assert capsys.readouterr() == ("", "1 files, 1 guests: no errors\n")
        assert main(["check", str(etc)]) == 0

    def test_every_fault_with_its_place(self, etc: Path, capsys: Captured) -> None:
        (etc / "guests.d/web.toml").write_text(WEB.replace("size", "sise").replace("vcpus = 2", 'vcpus = "two"'))
        (etc / "guests.d/db.toml").write_text("[memory\n")
        (etc / "notes.txt").write_text("")
        assert cli(etc, "check") == 8
        seen = capsys.readouterr()
        assert "guests.d/web.toml:7: memory.sise: unknown key (did you mean memory.size?)\n" in seen.out
        assert "guests.d/web.toml:10: cpu.vcpus:" in seen.out
        assert "guests.d/db.toml:1" in seen.out
        assert "notes.txt: warning:" in seen.err
        assert "warning" not in seen.out

    def test_warnings_alone_are_no_failure(self, etc: Path, capsys: Captured) -> None:
        disk = '[disk.root]\nfile = "/nowhere/root.img"\nformat = "raw"\n'
        (etc / "guests.d/web.toml").write_text(WEB + disk)
        assert cli(etc, "check") == 0
        assert "does not exist" in capsys.readouterr().err

    def test_json(self, etc: Path, capsys: Captured) -> None:
        (etc / "guests.d/web.toml").write_text(WEB.replace("size", "sise"))
        assert cli(etc, "check", "--json") == 8
        faults = json.loads(capsys.readouterr().out)["faults"]
        assert ("guests.d/web.toml", 7, "memory.sise") in [(f["file"], f["line"], f["key"]) for f in faults]

    def test_no_such_directory(self, tmp_path: Path) -> None:
        assert main(["check", str(tmp_path / "none")]) == 3


def test_kvmd_verb_is_for_what_needs_no_daemon(etc: Path, capsys: Captured) -> None:
    assert offline.main(["check", str(etc)]) == 0
    assert offline.main(["list"]) == 2
    assert "kvmd-cli list" in capsys.readouterr().err
    assert offline.main(["chekc"]) == 2


class TestInit:
    def test_writes_what_is_not_there_and_it_checks(self, tmp_path: Path, capsys: Captured) -> None:
        root = tmp_path / "new"
        assert cli(root, "init") == 0
        seen = capsys.readouterr()
        assert seen.out.splitlines() == [f"+ {root / file}" for file in EXAMPLES]
        assert "kvmd-cli create" in seen.err
        loaded = check(root)
        assert loaded.faults == ()
        assert loaded.desired.networks["lan"].network.mode == "nat"

    def test_never_overwrites(self, etc: Path, capsys: Captured) -> None:
        (etc / "host.toml").write_text("# mine\n")
        (etc / "networks.d/office.toml").write_text('[network]\nmode = "isolated"\n')
        assert cli(etc, "init") == 0
        assert (etc / "host.toml").read_text() == "# mine\n"
        assert not (etc / "networks.d/lan.toml").exists()
        assert (etc / "kvmd.toml").exists()
        capsys.readouterr()
        assert cli(etc, "init") == 0
        seen = capsys.readouterr()
        assert seen.out == ""
        assert "--network office" in seen.err

    def test_dry_run(self, tmp_path: Path, capsys: Captured) -> None:
        assert cli(tmp_path / "new", "init", "--dry-run") == 0
        assert "lan.toml" in capsys.readouterr().out
        assert not (tmp_path / "new").exists()


class TestCreate:
    def image(self, etc: Path, content: bytes = b"\0" * 512) -> Path:
        path = etc.parent / "root.img"
        path.write_bytes(content)
        return path

    def test_from_an_image(self, etc: Path, capsys: Captured) -> None:
        image = self.image(etc, b"QFI\xfb" + bytes(508))
        (etc / "networks.d/lan.toml").write_text(EXAMPLES["networks.d/lan.toml"])
        words = [
            "--image",
            str(image),
            "--network",
            "lan",
            "--memory",
            "2G",
            "--vcpus",
            "3",
            "--accel",
            "auto",
            "--auto",
        ]
        assert cli(etc, "create", "shop", *words) == 0
        seen = capsys.readouterr()
        assert seen.out == f"+ {etc}/guests.d/shop.toml\n"
        assert "next: kvmd-cli apply && kvmd-cli start shop" in seen.err
        path = etc / "guests.d/shop.toml"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        guest = check(etc).desired.guests["shop"]
        assert (guest.disk["root"].file, guest.disk["root"].format) == (str(image), "qcow2")
        assert (int(guest.memory.size), guest.cpu.vcpus, guest.machine.accel) == (2 << 30, 3, "auto")
        assert (guest.nic["lan"].network, guest.start.auto) == ("lan", True)

    def test_from_a_kernel(self, etc: Path) -> None:
        kernel = self.image(etc)
        words = ["--kernel", str(kernel), "--initrd", str(kernel), "--cmdline", 'console=ttyS0 x="y z"']
        assert cli(etc, "create", "k", *words) == 0
        boot = check(etc).desired.guests["k"].boot
        assert (boot.kernel, boot.initrd, boot.cmdline) == (str(kernel), str(kernel), 'console=ttyS0 x="y z"')

    def test_a_clash_is_the_new_guest_s_fault(self, etc: Path, capsys: Captured) -> None:
        words = ("--image", str(self.image(etc)), "--format", "raw")
        assert cli(etc, "create", "shop", *words) == 0
        assert cli(etc, "create", "before", *words) == 8
        assert "guests.d/before.toml:16: disk.root.file:" in capsys.readouterr().err

    def test_never_overwrites(self, etc: Path) -> None:
        assert cli(etc, "create", "web", "--image", str(self.image(etc)), "--format", "raw") == 4
        assert (etc / "guests.d/web.toml").read_text() == WEB

    def test_dry_run_shows_the_text(self, etc: Path, capsys: Captured) -> None:
        words = ["--image", str(self.image(etc)), "--format", "raw", "--description", 'a "quoted" \\thing']
        assert cli(etc, "create", "shop", "--dry-run", *words) == 0
        text = capsys.readouterr().out.partition("\n")[2]
        assert tomllib.loads(text)["guest"]["description"] == 'a "quoted" \\thing'
        assert not (etc / "guests.d/shop.toml").exists()

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            ("shop", 2, "--image FILE"),
            ("shop --image /nowhere/x", 3, "/nowhere/x does not exist"),
            ("shop --image {image} --format raw --network lna", 3, "no network lna"),
            ("shop --image {image} --format vmdk", 2, "not one of qcow2, raw"),
            ("shop --image {image} --format raw --memory 1GB", 2, "binary"),
            ("shop --image {image} --format raw --vcpus none", 2, "--vcpus"),
            ("shop --image {image} --format raw --vcpus 100000", 8, "cpu.vcpus"),
            ("shop --image {image} --format raw --initrd {image}", 2, "need --kernel"),
            ("Sh/op --image {image} --format raw", 2, "no guest can be called"),
            ("../shop --image {image} --format raw", 2, "no guest can be called"),
        ],
    )
    def test_what_cannot_be_changes_nothing(
        self, etc: Path, capsys: Captured, words: str, code: int, said: str
    ) -> None:
        before = sorted(str(path) for path in etc.rglob("*"))
        assert cli(etc, "create", *words.format(image=self.image(etc)).split()) == code
        seen = capsys.readouterr().err
        assert said in seen
        assert sorted(str(path) for path in etc.rglob("*")) == before


class TestSet:
    @pytest.mark.parametrize(
        ("words", "line", "said"),
        [
            (
                "memory.size 2GiB",
                '~ guests.d/web.toml: memory.size: "1GiB" -> "2GiB"  (restart)',
                "kvmd-cli restart web",
            ),
            ("memory.shares 200", "~ guests.d/web.toml: memory.shares: ", "kvmd-cli apply"),
            ("cpu.vcpus 4", "~ guests.d/web.toml: cpu.vcpus: 2 -> 4  (restart)", "kvmd-cli restart web"),
            ("guest.description shop", '~ guests.d/web.toml: guest.description: "" (default) -> "shop"', "counts"),
            ("cpu.vcpus --unset", "~ guests.d/web.toml: cpu.vcpus: 2 -> 1 (default)  (restart)", "restart"),
        ],
    )
    def test_old_and_new_and_what_it_takes(self, etc: Path, capsys: Captured, words: str, line: str, said: str) -> None:
        assert cli(etc, "set", "web", *words.split()) == 0
        seen = capsys.readouterr()
        assert seen.out.startswith(line)
        assert said in seen.err
        text = (etc / "guests.d/web.toml").read_text()
        assert "# the shop" in text
        assert check(etc).errors == ()

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            ("memory.sise 2GiB", 8, "memory.sise: unknown key (did you mean memory.size?)"),
            ("memory.size banana", 8, '"banana" is not a size'),
            ("memory 4", 8, "is a table"),
            ("tpm.version 2.0", 8, "not supported yet"),
            ("guest.owner --unset", 8, "no guest.owner"),
            ("memory.size", 2, "a VALUE, or --unset"),
            ("memory.size 1GiB --unset", 2, "a VALUE, or --unset"),
        ],
    )
    def test_what_does_not_check_changes_nothing(
        self, etc: Path, capsys: Captured, words: str, code: int, said: str
    ) -> None:
        assert cli(etc, "set", "web", *words.split()) == code
        assert said in capsys.readouterr().err
        assert (etc / "guests.d/web.toml").read_text() == WEB

    def test_faults_with_other_files_count(self, etc: Path, capsys: Captured) -> None:
        mac = '[nic.net0]\ntype = "user"\nmac = "52:54:00:00:00:0{}"\n'
        (etc / "guests.d/web.toml").write_text(WEB + mac.format(1))
        (etc / "guests.d/db.toml").write_text(WEB + mac.format(2))
        before = (etc / "guests.d/web.toml").read_text()
        assert cli(etc, "set", "web", "nic.net0.mac", "52:54:00:00:00:02") == 8
        assert "52:54:00:00:00:02" in capsys.readouterr().err
        assert (etc / "guests.d/web.toml").read_text() == before

    def test_a_fault_that_was_there_does_not_forbid_mending_another(self, etc: Path) -> None:
        (etc / "guests.d/web.toml").write_text(WEB.replace('"1GiB"', '"1GB"') + "sise = 4\n")
        assert cli(etc, "set", "web", "memory.size", "1GiB") == 0
        assert [fault.key for fault in check(etc).errors] == ["cpu.sise"]

    def test_dry_run_and_the_same_again(self, etc: Path, capsys: Captured) -> None:
        assert cli(etc, "set", "web", "memory.size", "2GiB", "--dry-run") == 0
        assert '-> "2GiB"' in capsys.readouterr().out
        assert (etc / "guests.d/web.toml").read_text() == WEB
        assert cli(etc, "set", "web", "memory.size", "1GiB") == 0
        assert "already" in capsys.readouterr().err
        assert (etc / "guests.d/web.toml").read_text() == WEB

    def test_keeps_the_file_s_rights(self, etc: Path) -> None:
        path = etc / "guests.d/web.toml"
        path.chmod(0o640)
        assert cli(etc, "set", "web", "memory.size", "2GiB") == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_no_such_guest(self, etc: Path, capsys: Captured) -> None:
        assert cli(etc, "set", "wbe", "memory.size", "2GiB") == 3
        assert "did you mean web?" in capsys.readouterr().err

    @settings(max_examples=20)
    @given(st.text(max_size=20).filter(lambda text: not text.startswith("-") and "\0" not in text))
    def test_any_text_is_set_or_refused(self, tmp_path_factory: Any, text: str) -> None:
        root = tmp_path_factory.mktemp("any")
        (root / "guests.d").mkdir()
        path = root / "guests.d/web.toml"
        path.write_text(WEB)
        code = main(["--config-dir", str(root), "set", "web", "guest.description", "--", text])
        assert code in (0, 8)
        if code == 0:
            assert check(root).errors == ()
        else:
            assert path.read_text() == WEB


class TestEdit:
    def editor(self, etc: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        path = etc.parent / "editor with space"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", f"'{path}' --flag")

    def test_what_checks_is_kept(self, etc: Path, monkeypatch: Any, capsys: Captured) -> None:
        self.editor(etc, monkeypatch, "sed -i 's/1GiB/2GiB/' \"$2\"")
        assert cli(etc, "edit", "web") == 0
        assert '"2GiB"' in (etc / "guests.d/web.toml").read_text()
        assert capsys.readouterr().err == "next: kvmd-cli plan\n"

    def test_what_does_not_check_is_not(self, etc: Path, monkeypatch: Any, capsys: Captured) -> None:
        self.editor(etc, monkeypatch, "sed -i 's/size/sise/' \"$2\"")
        assert cli(etc, "edit", "web") == 8
        assert "did you mean memory.size?" in capsys.readouterr().err
        assert (etc / "guests.d/web.toml").read_text() == WEB

    def test_not_changed_dry_run_and_a_failing_editor(self, etc: Path, monkeypatch: Any) -> None:
        self.editor(etc, monkeypatch, "true")
        assert cli(etc, "edit", "web") == 0
        self.editor(etc, monkeypatch, "echo '# more' >> \"$2\"")
        assert cli(etc, "edit", "web", "--dry-run") == 0
        self.editor(etc, monkeypatch, "exit 3")
        assert cli(etc, "edit", "web") == 1
        assert (etc / "guests.d/web.toml").read_text() == WEB
        assert cli(etc, "edit", "nope") == 3

    def test_someone_else_was_faster(self, etc: Path, monkeypatch: Any) -> None:
        path = etc / "guests.d/web.toml"
        self.editor(etc, monkeypatch, f"echo '# mine' >> \"$2\"; echo '# theirs' >> '{path}'")
        assert cli(etc, "edit", "web") == 4
        assert path.read_text() == WEB + "# theirs\n"
        assert (etc / "guests.d/web.toml.orig").read_text() == WEB + "# mine\n"


class TestLogs:
    @pytest.fixture
    def logs(self, etc: Path) -> Path:
        directory = etc.parent / "state/log/web"
        directory.mkdir(parents=True)
        (directory / "serial-console.log").write_bytes(b"one\r\ntwo\nthree\n")
        (directory / "qemu.log").write_bytes(b"a warning\n")
        return directory

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            ("", "one\r\ntwo\nthree\n"),
            ("--qemu", "a warning\n"),
            ("-n 1", "three\n"),
            ("--lines=0", ""),
            ("--serial console", "one\r\ntwo\nthree\n"),
        ],
    )
    def test_what_is_printed(self, etc: Path, logs: Path, capsysbinary: Any, words: str, text: str) -> None:
        assert cli(etc, "logs", "web", "--socket", "/nowhere", *words.split()) == 0
        assert capsysbinary.readouterr().out == text.encode()

    def test_several_ports_have_heads(self, etc: Path, logs: Path, capsys: Captured) -> None:
        (logs / "serial-second.log").write_text("2\n")
        assert cli(etc, "logs", "web", "--socket", "/nowhere", "-n", "1") == 0
        assert capsys.readouterr().out == "==> serial-console.log <==\nthree\n==> serial-second.log <==\n2\n"

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            ("web --serial other", 3, "there is: qemu.log, serial-console.log"),
            ("db", 3, "never started"),
            ("web --qemu --serial console", 2, "not both"),
            ("web -n few", 2, "a number"),
        ],
    )
    def test_what_is_not_there(self, etc: Path, logs: Path, capsys: Captured, words: str, code: int, said: str) -> None:
        assert cli(etc, "logs", "--socket", "/nowhere", *words.split()) == code
        assert said in capsys.readouterr().err

    def test_following_goes_on_and_sees_a_log_that_was_cut(
        self, etc: Path, logs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = iter([b"four\n", None, KeyboardInterrupt])

        def sleep(_seconds: float) -> None:
            step = next(steps)
            if step is None:
                (logs / "serial-console.log").write_bytes(b"new\n")
            elif isinstance(step, bytes):
                with (logs / "serial-console.log").open("ab") as log:
                    log.write(step)
            else:
                raise step

        monkeypatch.setattr("kvmd.cli.logs.time.sleep", sleep)
        assert cli(etc, "logs", "web", "-f", "--socket", "/nowhere") == 130
        assert capsys.readouterr().out == "one\r\ntwo\nthree\nfour\nnew\n"


def test_a_file_that_cannot_be_read_is_no_traceback(etc: Path, capsys: Captured) -> None:
    (etc / "guests.d/web.toml").unlink()
    (etc / "guests.d/web.toml").mkdir()
    assert cli(etc, "set", "web", "memory.size", "2GiB") == 1
    assert "web.toml: Is a directory" in capsys.readouterr().err
    assert (etc / "guests.d/web.toml").is_dir()
