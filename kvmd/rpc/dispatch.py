"""From one message to its answer: the only place where any exception of a handler becomes an error reply."""

from __future__ import annotations

import logging

from pydantic import BaseModel

from kvmd.errors import KvmdError, ProtocolFault, Refused
from kvmd.rpc.protocol import (
    INTERNAL_ERROR,
    Batch,
    Message,
    RawJson,
    Refusal,
    Request,
    encode_batch,
    encode_error,
    encode_result,
)
from kvmd.rpc.registry import Call, Registry

RESPONSE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


async def answer(registry: Registry, message: Message, call: Call) -> bytes | None:
    """The reply to a message without its newline, None when it wants none. Raises nothing but CancelledError.

    The members of a batch run one after the other, so a batch takes no more of the server than one request.
    """
    match message:
        case Request():
            return await _answer_one(registry, message, call)
        case Refusal():
            return encode_error(message.id, message.fault())
        case Batch(members):
            replies = [await answer(registry, member, call) for member in members]
            return encode_batch([reply for reply in replies if reply is not None])


async def _answer_one(registry: Registry, request: Request, call: Call) -> bytes | None:
    """Exists, allowed, well-formed, run: in this order, so that nothing is parsed for those who may not ask."""
    error: KvmdError
    try:
        method = registry.find(request.method)
        method.authorise(call.role, call.actor)
        params = method.parse(request.params)
        result = _encode(await method.handler(params, call))
        if len(result) > RESPONSE_BYTES:
            raise Refused(
                f"{request.method}: the answer has {len(result)} bytes, at most {RESPONSE_BYTES} are sent",
                hint="ask for less at a time",
            )
        return None if request.notification else encode_result(request.id, result)
    except KvmdError as fault:
        error = fault
    except Exception:
        _log.exception("%s by %s failed", request.method[:64], call.actor)
        error = ProtocolFault(INTERNAL_ERROR, "internal error", hint="the daemon's log has the details")
    return None if request.notification else encode_error(request.id, error)


def _encode(result: BaseModel | RawJson) -> bytes:
    return result.data if isinstance(result, RawJson) else result.model_dump_json().encode()
