"""Judgements about devices of the host for guests: an IOMMU, vfio-pci, each device that a file names. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.facts import Module
from kvmd.plan.hostreport import Finding, HostReport, count, fail, ok, skip
from kvmd.plan.modules import plan_modules, wanted
from kvmd.plan.sriov import plan_sriov
from kvmd.plan.vfio import MODULE, iommu_hint, plan_passthrough


def modules(report: HostReport) -> Iterator[Finding]:
    """What modules.load names, and what devices for guests need: there, with its node, or to be loaded."""
    names = wanted(report.desired)
    if not names:
        yield skip("no module is wanted: modules.load is empty, and no guest is given a device of the host")
        return
    actions, problems = plan_modules(report.desired, report.facts)
    for problem in problems:
        yield fail(f"{problem.subject}: {problem.message}", problem.hint)
    if not problems:
        missing = f"; {count(len(actions), 'of them')} kvmd has yet to load" if actions else ""
        yield ok(f"there for this kernel: {', '.join(sorted(names))}{missing}")


def iommu(report: HostReport) -> Iterator[Finding]:
    """Without one a device writes to any memory of the host, so none is given away."""
    users = sorted(name for name, guest in report.desired.guests.items() if guest.passthrough)
    found = report.facts.iommu
    if not users:
        yield skip("no guest is given a device of the host")
    elif found.groups:
        yield ok(f"an IOMMU is on: {count(found.groups, 'group')}")
    else:
        yield fail(f"no IOMMU is on; needed by {', '.join(users[:3])}", iommu_hint(found))


def passthrough(report: HostReport) -> Iterator[Finding]:
    """Each device a guest's file names, and each pool of virtual functions, can be had."""
    desired, facts = report.desired, report.facts
    users = [name for name, guest in desired.guests.items() if guest.passthrough]
    if not users and not desired.host.sriov:
        yield skip("no guest is given a device of the host")
        return
    pools, pool_problems = plan_sriov(desired.host.sriov, facts)
    coming = frozenset(action.pool for action in pools if action.new)
    _, problems = plan_passthrough(desired, facts, coming)
    for problem in (*pool_problems, *problems):
        yield fail(f"{problem.subject}: {problem.message}", problem.hint)
    if not problems and not pool_problems:
        driver = facts.modules.get(MODULE, Module(MODULE, "unknown")).state
        yield ok(f"{count(len(users), 'guest')} can have what they name ({MODULE} is {driver})")
