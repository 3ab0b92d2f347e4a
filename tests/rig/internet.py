"""A second network namespace that plays the internet: a cable to the host's one, and a server with one page.

The page says who asked for it, so a reader sees whether the host translated the guest's address.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from tests.rig.netns import Namespace, inside, private_namespace, veth

HOST_ADDRESS = "203.0.113.2"  # of the host's end of the cable; all addresses here are for documentation (RFC 5737)
ROUTER_ADDRESS = "203.0.113.1"
SERVER_ADDRESS = "198.51.100.80"  # not on the cable's own subnet: the way there is the default route
PAGE = "this is the internet, hello {client}"


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = PAGE.format(client=self.client_address[0]).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextlib.contextmanager
def internet(host: Namespace) -> Iterator[Namespace]:
    """`host` has an uplink and a default route, behind which http://SERVER_ADDRESS/ answers."""
    with private_namespace("internet") as outside:
        veth(host, "up0", outside, "down0")
        host.ip(f"address add {HOST_ADDRESS}/24 dev up0")
        host.ip(f"route add default via {ROUTER_ADDRESS}")
        outside.ip(f"address add {ROUTER_ADDRESS}/24 dev down0")
        outside.ip(f"address add {SERVER_ADDRESS}/32 dev lo")
        with inside(outside):
            server = _Server((SERVER_ADDRESS, 80), _Page)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield outside
        finally:
            server.shutdown()
            server.server_close()
            thread.join(10)
