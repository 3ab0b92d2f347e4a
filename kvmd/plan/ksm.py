"""Knobs of the host's memory management: page merging (KSM), transparent hugepages, swappiness.

`keep` and absent tables change nothing. These are tuning knobs: each write is marked so that another program's later
value is respected and reported, not fought. Rules of the KSM files: Documentation/admin-guide/mm/ksm.rst.

`ksm.mode = "off"` stops the scanner and leaves merged pages merged (they part when written to, or with their guest);
parting them all at once (run = 2) can need more memory than there is, so nobody but an administrator does it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmd.actions import Action, Problem, WriteKnob
from kvmd.config.host import Host, Ksm
from kvmd.facts import Facts

KSM = "/sys/kernel/mm/ksm"
THP = "/sys/kernel/mm/transparent_hugepage"
SWAPPINESS = "/proc/sys/vm/swappiness"

# everything plan_ksm looks at: what `observe_knobs` must be asked for
KNOBS = (
    *(
        f"{KSM}/{name}"
        for name in (
            "run",
            "pages_to_scan",
            "sleep_millisecs",
            "merge_across_nodes",
            "pages_shared",
            "advisor_mode",
            "advisor_max_cpu",
            "advisor_target_scan_time",
            "advisor_min_pages_to_scan",
            "advisor_max_pages_to_scan",
            "smart_scan",
            "use_zero_pages",
            "max_page_sharing",
        )
    ),
    f"{THP}/enabled",
    f"{THP}/defrag",
    f"{THP}/shmem_enabled",
    f"{THP}/khugepaged/defrag",
    SWAPPINESS,
)

PAGES_PER_CPU_S = 500_000  # at about 2 us to look at a page
MIN_PAGES, MAX_PAGES = 64, 1250  # the span in which ksmtuned moves


def plan_ksm(host: Host, facts: Facts) -> tuple[tuple[Action, ...], tuple[Problem, ...]]:
    """What differs from host.toml's [ksm], [thp] and [swap] (swappiness), in the order it must be written."""
    plan = _Plan(facts)
    _plan_merging(host.ksm, plan)
    if host.thp.enabled != "keep":
        plan.set(f"{THP}/enabled", host.thp.enabled, f"thp.enabled is {host.thp.enabled}")
    if host.thp.defrag != "keep":
        plan.set(f"{THP}/defrag", host.thp.defrag, f"thp.defrag is {host.thp.defrag}")
    if host.thp.shmem_enabled != "keep":
        plan.set(f"{THP}/shmem_enabled", host.thp.shmem_enabled, f"thp.shmem_enabled is {host.thp.shmem_enabled}")
    plan.switch(f"{THP}/khugepaged/defrag", host.thp.khugepaged_defrag, "thp.khugepaged_defrag")
    if host.swap.swappiness != "keep":
        plan.set(SWAPPINESS, str(host.swap.swappiness), f"swap.swappiness is {host.swap.swappiness}")
    return tuple(plan.actions), tuple(plan.problems)


def start_pages(max_cpu: float, sleep_s: float = 0.02) -> int:
    """pages_to_scan to begin with for this share of one CPU, as long as nothing was measured."""
    return max(MIN_PAGES, min(MAX_PAGES, round(max_cpu * sleep_s * PAGES_PER_CPU_S)))


def rate_wish(ksm: Ksm) -> str:
    """Why pages_to_scan is kvmd's: the same words for the plan's first rate and all that the tuning agent sets."""
    return f"ksm.mode is {ksm.mode}, within max_cpu {ksm.max_cpu}"


def driven(ksm: Ksm) -> Mapping[str, str]:
    """Knobs the tuning agent moves, each with its wish."""
    return {f"{KSM}/pages_to_scan": rate_wish(ksm)} if ksm.mode == "kvmd" else {}


class _Plan:
    """Collects writes of values that differ."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.actions: list[Action] = []
        self.problems: list[Problem] = []

    def has(self, path: str) -> bool:
        return path in self.facts.knobs

    def value(self, path: str) -> str:
        return self.facts.knobs.get(path, "")

    def set(self, path: str, new: str, why: str) -> None:
        """Plan the write; a knob this kernel does not have is a problem of the host."""
        if not self.has(path):
            self.problems.append(
                Problem(path, f"{why}, and this kernel has no {path}", "choose keep, or a kernel built with it")
            )
        elif self.value(path) != new:
            self.actions.append(WriteKnob(path=path, old=self.value(path), new=new, why=why, requirement=False))

    def switch(self, path: str, wish: bool | None, key: str) -> None:
        """A knob of 0 and 1 as its key says; None leaves it."""
        if wish is not None:
            self.set(path, "1" if wish else "0", f"{key} is {'true' if wish else 'false'}")

    def set_unmerged(self, path: str, new: str, key: str) -> None:
        """A knob the kernel changes only while nothing is merged (EBUSY otherwise)."""
        shared = self.value(f"{KSM}/pages_shared")
        if not self.has(path) or self.value(path) == new or shared in ("", "0"):
            self.set(path, new, key)
            return
        self.problems.append(
            Problem(
                subject="ksm",
                message=f"{key} asks for {path} = {new}, and the kernel refuses while pages are merged ({shared} now)",
                hint=f"with memory to spare: echo 2 > {KSM}/run, then plan again; or wait until these guests stop",
            )
        )


def _plan_merging(ksm: Ksm, plan: _Plan) -> None:
    if ksm.mode == "keep":
        return
    why = f"ksm.mode is {ksm.mode}"
    if ksm.mode == "off":
        # 2 means: stopped, and everything parted; that is off as well
        if plan.value(f"{KSM}/run") == "1":
            plan.set(f"{KSM}/run", "0", why)
        return
    if not plan.has(f"{KSM}/run"):
        plan.set(f"{KSM}/run", "1", why)
        return
    _plan_across_nodes(ksm, plan)
    if ksm.max_page_sharing is not None:
        plan.set_unmerged(
            f"{KSM}/max_page_sharing", str(ksm.max_page_sharing), f"ksm.max_page_sharing is {ksm.max_page_sharing}"
        )
    plan.switch(f"{KSM}/use_zero_pages", ksm.use_zero_pages, "ksm.use_zero_pages")
    plan.switch(f"{KSM}/smart_scan", ksm.smart_scan, "ksm.smart_scan")
    plan.set(f"{KSM}/sleep_millisecs", str(_sleep_ms(ksm)), f"ksm.sleep is {ksm.sleep}")
    if ksm.mode == "kernel":
        _plan_advisor(ksm, plan, why)
    else:
        _plan_own_rate(ksm, plan, why)
    plan.set(f"{KSM}/run", "1", why)


def _plan_across_nodes(ksm: Ksm, plan: _Plan) -> None:
    """On one node it has no meaning."""
    path = f"{KSM}/merge_across_nodes"
    new = "1" if ksm.across_nodes else "0"
    nodes = {cpu.node for cpu in plan.facts.cpus.cpus} | plan.facts.memory.node_total_bytes.keys()
    if len(nodes) > 1 and plan.has(path):
        plan.set_unmerged(path, new, f"ksm.across_nodes is {'true' if ksm.across_nodes else 'false'}")


def _sleep_ms(ksm: Ksm) -> int:
    return max(1, round(ksm.sleep * 1000))


def _plan_advisor(ksm: Ksm, plan: _Plan, why: str) -> None:
    """The kernel's own advisor where it has one (6.8), else a fixed rate; with the advisor pages_to_scan is its own."""
    advisor = f"{KSM}/advisor_mode"
    if not plan.has(advisor):
        pages = str(start_pages(ksm.max_cpu, ksm.sleep))
        plan.set(f"{KSM}/pages_to_scan", pages, f"{why}, max_cpu {ksm.max_cpu}, no advisor")
        return
    plan.set(advisor, "scan-time", why)
    for name, wish in (("min_pages", ksm.min_pages), ("max_pages", ksm.max_pages)):
        if wish is not None:
            plan.set(f"{KSM}/advisor_{name}_to_scan", str(wish), f"ksm.{name} is {wish}")
    percent = max(1, round(ksm.max_cpu * 100))
    plan.set(f"{KSM}/advisor_max_cpu", str(percent), f"ksm.max_cpu is {ksm.max_cpu}")
    seconds = max(1, round(ksm.scan_target))
    plan.set(f"{KSM}/advisor_target_scan_time", str(seconds), f"ksm.scan_target is {ksm.scan_target}")


def _plan_own_rate(ksm: Ksm, plan: _Plan, why: str) -> None:
    """A first rate when kvmd takes over; from then on the tuning agent owns pages_to_scan and no plan touches it."""
    advisor = f"{KSM}/advisor_mode"
    pages, rate_why = f"{KSM}/pages_to_scan", rate_wish(ksm)
    rate = str(start_pages(ksm.max_cpu, ksm.sleep))
    if plan.has(advisor) and plan.value(advisor) != "none":
        plan.set(advisor, "none", why)
        # whatever was read: leaving the advisor puts pages_to_scan back to the kernel's default
        plan.actions.append(WriteKnob(path=pages, old=plan.value(pages), new=rate, why=rate_why, requirement=False))
    elif plan.value(f"{KSM}/run") != "1":
        plan.set(pages, rate, rate_why)
