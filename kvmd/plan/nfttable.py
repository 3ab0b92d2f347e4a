"""kvmd's nftables tables as text and back: rendering, fingerprints, and what nft(8) says of them. Pure.

Each of our tables is replaced whole, in one transaction. What was put there is written into it, as the comment of the
only rule of the chain `about`: a digest of the text, and a digest of the *shape* (chains, and the comments of their
rules in order). The first tells kvmd that the files ask for something else now, the second that somebody else has been
in the table. The shape is used, not the listing, because nft's listing differs from what was fed to it and from version
to version.

Which rules there are is decided in nft.py (networks) and guard.py (ports). This module must not run nft.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

NETWORKS = "inet kvmd"
PORTS = "bridge kvmd"
EDITED = " edited"  # behind the fingerprint of a table that is not as we left it
_MARK = "kvmd sha256:"
_ABOUT = "about"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. The comment names whose it is and its purpose; nft takes at most 128 bytes of it."""

    text: str
    comment: str


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain; without a hook one that others jump to. `priority` as a number: so nft lists it in every version."""

    name: str
    rules: tuple[Rule, ...]
    kind: str = ""
    hook: str | None = None
    priority: int | None = None
    policy: str | None = None


def base(name: str, kind: str, hook: str, priority: int, rules: Iterable[Rule]) -> Chain:
    """A chain the kernel enters by itself, which accepts what no rule decides."""
    return Chain(name, tuple(rules), kind, hook, priority, "accept")


def remove_text(table: str) -> str:
    """Input for nft that removes a table. `add` first: deleting what is not there is an error."""
    return f"add table {table}\ndelete table {table}\n"


def table_text(table: str, chains: Iterable[Chain]) -> str:
    """Input for `nft -f -` that makes the table exactly these chains; "" when none has a rule."""
    wanted = [chain for chain in chains if chain.rules]
    if not wanted:
        return ""
    body = "".join(map(_chain_text, wanted))
    digest = hashlib.sha256(body.encode()).hexdigest()[:32]
    about = f'\tchain {_ABOUT} {{\n\t\treturn comment "{_MARK}{digest} shape:{_shape_of(wanted)}"\n\t}}\n'
    return f"{remove_text(table)}table {table} {{\n{about}{body}}}\n"


def fingerprint(text: str) -> str | None:
    """The fingerprint inside a text of `table_text`; None for the empty one."""
    start = text.find(_MARK)
    return None if start < 0 else text[start : text.index('"', start)]


def difference(text: str, there: str | None) -> str | None:
    """What separates the table from its wanted text, in the words of `ReplaceRuleset.change`; None: nothing does."""
    wanted = fingerprint(text)
    if there == wanted:
        return None
    if not text:
        return "remove"
    if there is None:
        return "create"
    return "as declared again" if there == f"{wanted}{EDITED}" else "rules differ"


def _chain_text(chain: Chain) -> str:
    head = ""
    if chain.hook:
        head = f"\t\ttype {chain.kind} hook {chain.hook} priority {chain.priority}; policy {chain.policy};\n"
    rules = "".join(f'\t\t{rule.text} comment "{rule.comment}"\n' for rule in chain.rules)
    return f"\tchain {chain.name} {{\n{head}{rules}\t}}\n"


def _shape_of(chains: Iterable[Chain]) -> str:
    return _digest(
        ([chain.name, chain.hook, chain.priority, chain.policy], [rule.comment for rule in chain.rules])
        for chain in chains
    )


def _digest(chains: Iterable[tuple[list[object], list[str]]]) -> str:
    return hashlib.sha256(json.dumps(sorted(chains)).encode()).hexdigest()[:16]


def read_fingerprint(listing: str) -> str:
    """The fingerprint in what `nft -j list table` prints, EDITED behind it if somebody changed the table.

    A table without our mark gives "unmarked". Raises ValueError for anything that is not such a listing.
    """
    heads: dict[str, list[object]] = {}
    comments: dict[str, list[str]] = {}
    try:
        for item in json.loads(listing)["nftables"]:
            if "chain" in item:
                chain = item["chain"]
                heads[chain["name"]] = [chain["name"], chain.get("hook"), chain.get("prio"), chain.get("policy")]
            elif "rule" in item:
                comments.setdefault(item["rule"]["chain"], []).append(item["rule"].get("comment", ""))
            elif item.keys() & {"set", "map", "element", "flowtable"}:
                heads[f"+{len(heads)}"] = sorted(item)  # we make none
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a listing of nft: {error!r}") from None
    marks = comments.pop(_ABOUT, [])
    heads.pop(_ABOUT, None)
    if len(marks) != 1 or not marks[0].startswith(_MARK):
        return "unmarked"
    shape = _digest((head, comments.get(name, [])) for name, head in heads.items())
    return marks[0] if marks[0].endswith(f" shape:{shape}") else marks[0] + EDITED
