"""The methods that belong to the protocol itself: the description of the API and the stream of events."""

from __future__ import annotations

import json

from kvmd.rpc.events import EventHub
from kvmd.rpc.protocol import RawJson
from kvmd.rpc.registry import Call, NoParams, Registry
from kvmd.rpc.results import OpenRpcDocument, SubscribeParams, SubscribeResult


def add_builtin(registry: Registry, hub: EventHub, *, version: str) -> None:
    """Register `rpc.discover` and `events.subscribe`. The document is made at the first question and kept."""
    document: list[RawJson] = []

    @registry.method("rpc.discover", role="viewer", params=NoParams, result=OpenRpcDocument)
    async def discover(_params: NoParams, _call: Call) -> RawJson:
        """This API as an OpenRPC document"""
        if not document:
            document.append(RawJson(json.dumps(registry.discover(version=version), separators=(",", ":")).encode()))
        return document[0]

    @registry.method("events.subscribe", role="viewer", params=SubscribeParams, result=SubscribeResult)
    async def subscribe(params: SubscribeParams, call: Call) -> SubscribeResult:
        """Events from now on, or from after a cursor, as notifications on this connection"""
        subscription = hub.subscribe(call.outlet, params.since, params.types)
        call.after_reply.append(subscription.start)
        return SubscribeResult(subscription=subscription.name, cursor=hub.cursor)
