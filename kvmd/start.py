"""`kvmd`'s entry point: everything is loaded with the garbage collector off, which is a tenth of the time to be there.

A restarted kvmd is deaf until it has loaded, so that time counts; nothing that is loaded then is garbage. The daemon
switches the collector on when it is ready.
"""

from __future__ import annotations

import gc


def main() -> int:
    """As `kvmd.daemon.main`."""
    gc.disable()
    from kvmd.daemon import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
