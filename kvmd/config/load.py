"""/etc/kvmd -> Desired, with every fault of every file at once.

A file that does not check never keeps another from loading: it is replaced by its last good version where
there is one, and left out where there is none. Loading never raises for anything a file contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from kvmd.config import cross, files
from kvmd.config.catalogue import MODELS, FileKind
from kvmd.config.daemon import Daemon
from kvmd.config.desired import Desired, Fault, Loaded, Severity
from kvmd.config.document import Document, faults, merged, parse
from kvmd.config.faults import MAX_SHOWN, Complaint, at_most, complaints, present
from kvmd.config.guest import Guest
from kvmd.config.host import Host
from kvmd.config.key import Table, quote
from kvmd.config.lines import KeyPath
from kvmd.config.network import Network
from kvmd.config.network_rules import network_rules
from kvmd.config.rules import daemon_rules, guest_rules, host_rules

__all__ = ["Desired", "Fault", "Loaded", "check", "load", "save_last_good"]

T = TypeVar("T", bound=Table)
Rules = Callable[[T], Iterator[Complaint]]


def load(config_dir: Path, *, last_good_dir: Path | None = None, require_root_owner: bool = False) -> Loaded:
    """The desired state and all faults. `require_root_owner` refuses files another user could have written."""
    current = files.read_tree(config_dir, require_root_owner=require_root_owner)
    good = files.read_tree(last_good_dir) if last_good_dir is not None and last_good_dir.is_dir() else files.Tree()
    return _Loading(current, good.sources).run()


def check(config_dir: Path) -> Loaded:
    """What `kvmd-cli check` shows: `load`, and warnings for images that are not there. Needs no daemon, no root."""
    return _Loading(files.read_tree(config_dir), {}, look_for_images=True).run()


def save_last_good(loaded: Loaded, last_good_dir: Path) -> None:
    """Keeps every file that checked clean; each is replaced atomically. Raises OSError.

    A guest's profile is kept beside it under the guest's own name, so that a later change of the profile cannot
    spoil the guest's last good version. What was removed is removed here only if its directory could be read
    and is not empty: an unmounted or emptied directory is a fault, not a wish.
    """
    kept = files.read_tree(last_good_dir).sources if last_good_dir.is_dir() else {}
    gone = frozenset(file for file in kept if file not in loaded.keep and _was_removed(file, loaded))
    files.write_copies(last_good_dir, loaded.keep, gone)


def _was_removed(file: str, loaded: Loaded) -> bool:
    directory, _, name = file.rpartition("/")
    if directory == "profiles.d":
        guest = f"guests.d/{name}"
        return guest in loaded.keep or _was_removed(guest, loaded)
    listed = loaded.listed.get(directory, frozenset())
    if directory == "guests.d" and not any(_is_toml(entry) for entry in listed):
        return False
    return bool(listed) and name not in listed


def _is_toml(name: str) -> bool:
    return name.endswith(".toml") and not files.dropping(name)


@dataclass(frozen=True, slots=True)
class _Read:
    """One guest or network as its present file has it."""

    model: Any
    document: Document | None
    profile: Document | None = None
    rank: int = 0  # admitted in this order: 0 as it was, 1 edited, 2 new


@dataclass(slots=True)
class _Loading:
    tree: files.Tree
    good: Mapping[str, bytes]
    look_for_images: bool = False
    found: list[Fault] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)  # guests whose fault may stand in their profile
    keep: dict[str, bytes] = field(default_factory=dict)
    network_documents: dict[str, Document] = field(default_factory=dict)  # of admitted networks, as they are now

    def run(self) -> Loaded:
        self.found.extend(self.tree.faults)
        daemon = self._single("kvmd.toml", Daemon(), daemon_rules)
        host = self._single("host.toml", Host(), host_rules)
        networks = self._networks()
        profiles = self._profiles()
        guests = self._guests(daemon, networks, profiles)
        desired = Desired(
            daemon, host, dict(sorted(networks.items())), dict(sorted(guests.items())), frozenset(self.stale)
        )
        return Loaded(
            desired=desired,
            faults=_shown(self.found),
            sources=dict(self.tree.sources),
            faulty=frozenset(fault.file for fault in self.found if fault.severity == "error") | self.broken,
            keep=self.keep,
            listed=dict(self.tree.listed),
        )

    def _single(self, file: str, absent: T, rules: Rules[T]) -> T:
        """kvmd.toml or host.toml; `absent` is what holds without the file."""
        kind = cast(FileKind, file)
        raw = self.tree.sources.get(file)
        if raw is not None and (document := self._parse(file, raw)) is not None:
            model, wrong = _validated(kind, document, rules)
            self.found.extend(wrong)
            if model is not None:
                self.keep[file] = raw
                return cast(T, model)
        if raw is None and "" in self.tree.listed and file not in self.tree.listed[""]:
            return absent
        old = self._good(kind, file, rules)
        if old is None:
            return absent
        self.stale.add(file)
        return cast(T, old)

    def _good(self, kind: FileKind, file: str, rules: Rules[Any], below: Document | None = None) -> Any:
        """The last good version if it still checks, silently; None otherwise."""
        raw = self.good.get(file)
        document = parse(file, raw) if raw is not None else None
        return _validated(kind, document, rules, below)[0] if isinstance(document, Document) else None

    def _parse(self, file: str, raw: bytes) -> Document | None:
        document = parse(file, raw)
        if isinstance(document, Fault):
            self.found.append(document)
            return None
        return document

    def _names(self, directory: str) -> list[str]:
        """Names that have a file, readable or not. Without a readable directory: those of the last good state."""
        listed = self.tree.listed.get(directory)
        if listed is None and (directory in self.tree.listed.get("", (directory,)) or directory == "guests.d"):
            listed = frozenset(
                file.removeprefix(f"{directory}/") for file in self.good if file.startswith(f"{directory}/")
            )
        names = {entry.removesuffix(".toml") for entry in listed or () if _is_toml(entry)}
        return sorted(names)

    def _networks(self) -> dict[str, Network]:
        reads: dict[str, _Read] = {}
        for name in self._names("networks.d"):
            file = f"networks.d/{name}.toml"
            raw = self.tree.sources.get(file)
            document = self._parse(file, raw) if raw is not None else None
            model: Any = None
            if document is not None:
                model, wrong = _validated("networks.d", document, _network_rules(name))
                self.found.extend(wrong)
            reads[name] = _Read(model, document, rank=self._rank(model, raw, self.good.get(file)))
        admitted = cross.Networks()
        for name in sorted(reads, key=lambda name: (reads[name].rank, name)):
            file, read = f"networks.d/{name}.toml", reads[name]
            model = self._admissible(name, read, admitted.refuse)
            if model is not None and read.document is not None:
                self.keep[file] = read.document.raw
                self.network_documents[name] = read.document
            else:
                model = self._good("networks.d", file, _network_rules(name))
                if model is None or admitted.refuse(name, model):
                    continue
                self.stale.add(file)
            admitted.admitted[name] = model
        return admitted.admitted

    def _admissible(self, name: str, read: _Read, refuse: Callable[[str, Any], list[Complaint]]) -> Any:
        """The model if nothing admitted before stands against it; complaints go to the faults."""
        if read.model is None or read.document is None:
            return None
        clashes = refuse(name, read.model)
        self.found.extend(faults(read.document, clashes, read.profile))
        return None if any(clash.severity == "error" for clash in clashes) else read.model

    @staticmethod
    def _rank(model: object, raw: bytes | None, good: bytes | None) -> int:
        if good is None:
            return 2
        return 0 if model is None or raw == good else 1

    def _profiles(self) -> dict[str, Document | None]:
        """Profiles by name; None for one that has faults."""
        profiles: dict[str, Document | None] = {}
        for entry in sorted(self.tree.listed.get("profiles.d", ())):
            if not _is_toml(entry):
                continue
            file = f"profiles.d/{entry}"
            raw = self.tree.sources.get(file)
            document = self._parse(file, raw) if raw is not None else None
            wrong = faults(document, _profile_complaints(document.data)) if document is not None else []
            self.found.extend(wrong)
            profiles[entry.removesuffix(".toml")] = None if wrong else document
        return profiles

    def _guests(
        self, daemon: Daemon, networks: Mapping[str, Network], profiles: Mapping[str, Document | None]
    ) -> dict[str, Guest]:
        names = self._guest_names()
        self._default_profile(daemon, profiles)
        reads = {name: self._guest(name, daemon, profiles) for name in names}
        admitted = cross.Guests(networks, frozenset(self._names("networks.d")), frozenset(names))
        guests: dict[str, Guest] = {}
        for name in sorted(reads, key=lambda name: (reads[name].rank, name)):
            read, file = reads[name], f"guests.d/{name}.toml"
            model = self._admissible(name, read, admitted.refuse)
            if model is not None and read.document is not None:
                self._settle(read, file, name, daemon)
            else:
                self.broken.add(file)
                model = self._good("guests.d", file, guest_rules, self._good_profile(name))
                if model is None or any(clash.severity == "error" for clash in admitted.refuse(name, model)):
                    continue
                self.stale.add(name)
            admitted.admit(name, model)
            guests[name] = model
        for network, document in sorted(self.network_documents.items()):
            astray = cross.forwards_astray(network, networks[network], guests, frozenset(names))
            self.found.extend(faults(document, astray))
        return guests

    def _settle(self, read: _Read, file: str, name: str, daemon: Daemon) -> None:
        """A guest that is in order: kept as last good, warned about where that is due."""
        if read.document is None:
            return
        self.keep[file] = read.document.raw
        if read.profile is not None:
            self.keep[f"profiles.d/{name}.toml"] = read.profile.raw
        warnings = list(cross.outside_roots(daemon, read.model))
        if self.look_for_images:
            warnings.extend(_missing_files(read.model))
        self.found.extend(faults(read.document, warnings, read.profile))

    def _guest_names(self) -> list[str]:
        names = self._names("guests.d")
        good = sorted(file for file in self.good if file.startswith("guests.d/"))
        if good and not any(_is_toml(entry) for entry in self.tree.listed.get("guests.d", ())):
            text = f"is empty or cannot be read, but {len(good)} guests were in it: they stay as they were"
            hint = "put the files back; if it is meant, remove their last good copies"
            self.found.append(Fault("guests.d", None, None, text, hint))
            return [file.removeprefix("guests.d/").removesuffix(".toml") for file in good]
        return names

    def _guest(self, name: str, daemon: Daemon, profiles: Mapping[str, Document | None]) -> _Read:
        file = f"guests.d/{name}.toml"
        raw = self.tree.sources.get(file)
        document = self._parse(file, raw) if raw is not None else None
        if raw is None or document is None:
            return _Read(None, None, rank=self._rank(None, raw, self.good.get(file)))
        profile, complaint = _profile_of(document, daemon, profiles)
        if complaint is not None:
            self.found.append(document.fault(complaint))
            return _Read(None, document, rank=self._rank(None, raw, self.good.get(file)))
        model, wrong = _validated("guests.d", document, guest_rules, profile)
        self.found.extend(wrong)
        same_profile = (profile.raw if profile is not None else None) == self.good.get(f"profiles.d/{name}.toml")
        rank = self._rank(model, raw if same_profile else None, self.good.get(file))
        return _Read(model, document, profile, rank)

    def _good_profile(self, name: str) -> Document | None:
        raw = self.good.get(f"profiles.d/{name}.toml")
        document = parse("", raw) if raw is not None else None
        return document if isinstance(document, Document) else None

    def _default_profile(self, daemon: Daemon, profiles: Mapping[str, Document | None]) -> None:
        name = daemon.guests.default_profile
        raw = self.keep.get("kvmd.toml")
        if name is None or name in profiles or raw is None:
            return
        document = parse("kvmd.toml", raw)
        if isinstance(document, Document):
            text = f"there is no profiles.d/{name}.toml"
            self.found.append(document.fault(Complaint(("guests", "default_profile"), text)))
            del self.keep["kvmd.toml"]


def _network_rules(name: str) -> Rules[Any]:
    return lambda network: network_rules(name, network)


def _validated(
    kind: FileKind, document: Document, rules: Rules[Any], below: Document | None = None
) -> tuple[Any, list[Fault]]:
    """The model, None if there is an error, and the placed faults."""
    data = merged(below.data, document.data) if below is not None else document.data
    try:
        model: Any = MODELS[kind].model_validate(data)
    except ValidationError as error:
        wrong = [_with_format(complaint, data) for complaint in complaints(kind, error)]
        return None, faults(document, wrong, below)
    wrong = at_most(rules(model))
    bad = any(complaint.severity == "error" for complaint in wrong)
    return None if bad else model, faults(document, wrong, below)


def _with_format(complaint: Complaint, data: Mapping[str, Any]) -> Complaint:
    """A missing disk.NAME.format gets the line to paste, by the image's first bytes."""
    path = complaint.path
    if complaint.given or len(path) != 3 or path[0] != "disk" or path[2] != "format":
        return complaint
    file = data["disk"][path[1]].get("file")
    guess = files.guess_format(file) if isinstance(file, str) and file.startswith("/") else None
    if guess is None:
        return changed(complaint, hint='format = "raw" or format = "qcow2"')
    return changed(complaint, hint=f'by its first bytes: format = "{guess}"')


def _profile_complaints(data: Mapping[str, Any]) -> list[Complaint]:
    """What is wrong with a profile whatever guest uses it. Required keys may come from the guest."""
    found = [
        Complaint(("guest", key), f"{why}, so no profile can have it")
        for key, why in (("uuid", "one guest's own"), ("profile", "profiles do not build on each other"))
        if present(data, ("guest", key))
    ]
    try:
        MODELS["guests.d"].model_validate(data)
    except ValidationError as error:
        found.extend(complaint for complaint in complaints("guests.d", error) if complaint.given)
    return found


def _profile_of(
    document: Document, daemon: Daemon, profiles: Mapping[str, Document | None]
) -> tuple[Document | None, Complaint | None]:
    """The profile below a guest, or why there is none."""
    about = document.data.get("guest")
    named = about.get("profile") if isinstance(about, dict) else None
    name = named if isinstance(named, str) else daemon.guests.default_profile
    if name is None:
        return None, None
    path = ("guest", "profile")
    if name not in profiles:
        return None, Complaint(path, f"unknown profile {quote(name)}", f"there is: {', '.join(profiles) or 'none'}")
    profile = profiles[name]
    if profile is None:
        return None, Complaint(path, f"profiles.d/{name}.toml has faults, so this guest cannot be read")
    return profile, None


def _missing_files(guest: Guest) -> Iterator[Complaint]:
    wanted: list[tuple[KeyPath, str]] = [(("disk", name, "file"), disk.file) for name, disk in guest.disk.items()]
    wanted += [
        (("boot", key), file) for key, file in (("kernel", guest.boot.kernel), ("initrd", guest.boot.initrd)) if file
    ]
    for path, file in wanted:
        if files.missing(file):
            yield Complaint(path, f"{quote(file)} does not exist", severity="warning")


def _shown(found: Iterable[Fault]) -> tuple[Fault, ...]:
    """Sorted by place; of more than MAX_SHOWN the errors come first and the rest is counted."""
    ordered = sorted(set(found), key=lambda fault: (fault.file, fault.line or 0, fault.key or "", fault.message))
    rest = len(ordered) - MAX_SHOWN
    if rest <= 0:
        return tuple(ordered)
    picked = sorted(ordered, key=lambda fault: fault.severity != "error")[:MAX_SHOWN]
    hidden = [fault for fault in ordered if fault not in set(picked)]
    severity: Severity = "error" if any(fault.severity == "error" for fault in hidden) else "warning"
    more = Fault(".", None, None, f"{rest} more faults are not shown", None, severity)
    return (*sorted(picked, key=ordered.index), more)
