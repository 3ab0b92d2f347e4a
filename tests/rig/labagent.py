"""The lab VM's end of the test harness: runs commands for the host, one JSON value per line over a virtio-serial port.

Baked into the lab's root disk and run there by kvmd-lab.service with the distribution's Python; standard library
only. It says hello with the boot id whenever it starts (so a reboot is seen), and every 2 s until the first request,
since a port whose other end is not open yet throws data away.

Request: {"id": 1, "argv": ["ls"], "stdin": "", "timeout_s": 60, "environment": {}}
Reply:   {"id": 1, "status": 0, "stdout": "…", "stderr": "…"}; status 124 when it took longer than timeout_s.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

PORT = Path("/dev/virtio-ports/kvmd.lab")


def execute(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request's argv and return the reply."""
    try:
        ran = subprocess.run(
            request["argv"],
            input=request.get("stdin", "").encode(),
            capture_output=True,
            timeout=request.get("timeout_s", 60),
            env={**os.environ, **request.get("environment", {})},
            cwd="/",
            check=False,
        )
        status, out, err = ran.returncode, ran.stdout, ran.stderr
    except subprocess.TimeoutExpired as late:
        status, out, err = 124, late.stdout or b"", (late.stderr or b"") + b"\nkilled: it took too long\n"
    except OSError as error:
        status, out, err = 127, b"", str(error).encode()
    return {
        "id": request["id"],
        "status": status,
        "stdout": out.decode("utf-8", "replace"),
        "stderr": err.decode("utf-8", "replace"),
    }


def main() -> None:
    """Serve the port for ever; each request runs in a thread of its own."""
    while not PORT.exists():
        time.sleep(0.1)
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    writing = threading.Lock()
    heard = threading.Event()

    def send(value: dict[str, Any]) -> None:
        data = json.dumps(value).encode() + b"\n"
        with writing:
            while data:
                data = data[os.write(port, data) :]

    def greet() -> None:
        while not heard.is_set():
            send({"hello": boot_id, "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME)})
            heard.wait(2)

    threading.Thread(target=greet, daemon=True).start()
    pending = b""
    while True:
        data = os.read(port, 65536)
        if not data:
            # The host's end is closed: reads return at once until it is opened again.
            time.sleep(0.1)
            continue
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            heard.set()
            request = json.loads(line)
            threading.Thread(target=lambda request=request: send(execute(request)), daemon=True).start()


if __name__ == "__main__":
    main()
