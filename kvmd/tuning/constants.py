"""Every number the tuning agent judges by, in one place, with where it comes from.

"design" is the tuning design's starting value, to be moved by the benchmark and not by taste. Nothing here is read
from configuration: what an administrator may set is in `snapshot.Limits`.
"""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30

# How often to look (design: 2 s for pressed or moving guests, 30 s for quiet ones, 25 QMP calls a second).
TICK_S = 2.0
QUIET_TICK_S = 4.0
QUIET_POLL_MAX_S = 30.0
QMP_CALLS_PER_S = 25.0
QUIET_CALLS_PER_S = 6.0  # what quiet guests alone may cost: 0.32 ms of CPU a call is 0.2 % of one CPU
CALLS_PER_SAMPLE = 2  # guest-stats and query-balloon
KSM_TICK_S = 10.0

# Whose figures may be believed.
STALE_POLLS = 3  # design: older than three polls is no driver
TAKE_FRESH_S = 10.0  # own: nothing is taken on figures older than this, however slowly a guest is polled
CONTRADICTION = 1.02  # own: "available" above actual by more than this factor in two readings is nonsense
BOOT_S = 120.0  # design: a booting guest gives nothing
BOOT_STEADY_S = 20.0  # own: ... unless its use has not grown for so long: it has booted

# The guest model (design).
DEMAND_DECAY_S = 100.0
HEADROOM_MIN = 0.08
HEADROOM_MAX = 0.30
HEADROOM_GROWTH = 1.25
HEADROOM_DECAY_S = 2000.0
LEAN_DEMAND = 0.5  # own: of a past peak, what still counts against a neighbour that starves now
PRESSED_FRACTION = 0.25  # of the head-room
PRESSED_MIN_BYTES = 32 * MIB  # own: a quarter of a small guest's head-room lies below the dead band, too late to act
PRESSED_MIN_FRACTION = 1 / 16  # ... of M, so that the smallest guests are not always pressed
SWAP_IN_BPS = 256 * 1024
MAJOR_FAULTS_PER_S = 20.0
MAJOR_FAULTS_FACTOR = 4.0  # times the guest's own baseline
FAULT_BASELINE_S = 300.0
PAGING_HEADROOMS = 2.0  # own: paging counts as pressure only below so many head-rooms; reading a file maps it too
GUEST_PSI_SOME = 0.05
WANT_HEADROOMS = 1.5
GROWTH_LOOKAHEAD_S = 4.0  # own: two ticks, what a growing guest takes before it can be asked again

# The host's states: shares of RAM that guests may use (design; hysteresis 1 pp and three samples upward).
OK_ABOVE = 0.11
SOFT_BELOW = 0.08
HARD_BELOW = 0.04
CRIT_BELOW = 0.02
HYSTERESIS = 0.01
SAMPLES_UP = 3
HARD_PSI_FULL = 0.01
CRIT_PSI_FULL = 0.10
PSI_RELEVANT_BELOW = 0.25  # own: stalls with a quarter free come from someone's cgroup limit, which no guest can cure
RECLAIM_AIM = 0.095  # own: the middle of the dead zone between SOFT and OK, so that neither side is provoked
WATER_AIM = 0.06  # own: below floors only until well out of HARD
GRANT_KEEP = 0.05  # own: a pressed guest may use the host's own spare memory down to here (HARD plus hysteresis)

# Transfer (design).
IDLE_TAX = 0.75  # Waldspurger 2002, section 5.2: an idle page costs 1 / (1 - tax) of an active one
SPARE_FRACTION = 0.5  # of what the guest says it can spare, a step
STEP_MAX_BYTES = 512 * MIB
STEP_MAX_FRACTION = 0.08
DEAD_BAND_BYTES = 16 * MIB
DEAD_BAND_FRACTION = 0.01
GIVE_BACK_FRACTION = 0.5  # own: of the host's surplus, a tick
GIFT_SETTLE_S = 20.0  # own: a gift is not seen in MemAvailable before the guest touches it
RETURN_SETTLE_S = 10.0  # own: memory back from a balloon is not seen in MemAvailable before its huge pages are split

# Moves and their consequences.
SETTLE_S = 10.0  # own: a balloon that has not moved for so long has stopped
SETTLE_SLACK_BYTES = 4 * MIB
FRUITLESS_FRACTION = 0.25  # own: a take that lowers the QEMU's RSS by less of itself took untouched memory
EFFECT_FRACTION = 0.10  # own: less than this of a step is no effect
INEFFECTIVE_MOVES = 2  # design
INEFFECTIVE_BAR_S = 900.0
HURT_WINDOW_S = 30.0  # own: pressed so soon after a take: the take hurt
HOLD_MIN_S = 60.0  # design
HOLD_MAX_S = 900.0  # design
REVERSAL_S = 60.0  # design: one reversal per hold
WRITE_INTERVAL_S = 1.0  # design: at most one write a second and knob
QEMU_OWN_BYTES = 64 * MIB  # own: of a QEMU's RSS, what is not the guest's memory


def dead_band_bytes(memory_bytes: int) -> int:
    """The smallest step worth disturbing a guest of this size for, in whole MiB."""
    return max(DEAD_BAND_BYTES, -int(-memory_bytes * DEAD_BAND_FRACTION // MIB) * MIB)


def step_max_bytes(memory_bytes: int) -> int:
    """The largest take a tick."""
    return max(STEP_MAX_BYTES, int(memory_bytes * STEP_MAX_FRACTION))


def pressed_min_bytes(memory_bytes: int) -> int:
    """Less available than this is pressure in a guest of this size, however small its head-room."""
    return min(PRESSED_MIN_BYTES, int(PRESSED_MIN_FRACTION * memory_bytes))
