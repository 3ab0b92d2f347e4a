"""The table of methods: who may call each, what it takes, what it gives, and the OpenRPC document made from it.

A Registry is built by the daemon and filled by explicit calls; nothing registers itself at import. Checks here
come in the order a hostile peer meets them: does the method exist, may this role call it, are the params right.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import models_json_schema

from kvmd.errors import Denied, ProtocolFault
from kvmd.rpc.auth import Peer, Role
from kvmd.rpc.protocol import INVALID_PARAMS, METHOD_NOT_FOUND, RawJson

OPENRPC_VERSION = "1.3.2"  # https://spec.open-rpc.org/
_FAULTS_SHOWN = 16


class Outlet(Protocol):
    """The way to one client besides answering it. Nothing here blocks or raises."""

    @property
    def ready(self) -> bool:
        """Whether a line sent now would go out without piling up."""

    def send(self, line: bytes) -> None:
        """Send one line (the newline is added)."""

    def hang_up(self, last_line: bytes) -> None:
        """Send a last line and close the connection once it is out."""

    def later(self, callback: Callable[[], None]) -> None:
        """Call back when others had their turn."""

    def attach(self, follower: Follower) -> None:
        """Tell `follower` about this connection from now on; Conflict when it has one."""


class Follower(Protocol):
    """Something that lives as long as a connection, such as a subscription."""

    def resume(self) -> None:
        """The client has taken what was waiting for it."""

    def close(self) -> None:
        """The connection is gone."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows about who calls it."""

    peer: Peer
    role: Role
    actor: str  # for events and logs: "root", "alice", "uid 1000"
    outlet: Outlet
    after_reply: list[Callable[[], None]] = field(default_factory=list)  # run once the answer has been sent


ParamsT = TypeVar("ParamsT", bound=BaseModel)
Handler = Callable[[ParamsT, Call], Awaitable[BaseModel | RawJson]]


class NoParams(BaseModel):
    """For methods that take nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    role: Role
    params: type[BaseModel]
    result: type[BaseModel]
    summary: str
    handler: Handler[Any]

    @property
    def readonly(self) -> bool:
        """What a viewer may call changes nothing; everything else needs more."""
        return self.role is Role.VIEWER

    def authorise(self, role: Role, actor: str) -> None:
        """Denied unless `role` includes the method's."""
        if not role.includes(self.role):
            raise Denied(
                f"{self.name} needs the role {self.role}; {actor} has {role}",
                hint=f"access.{self.role}s in kvmd.toml lists who has it",
                method=self.name,
                needed=str(self.role),
                role=str(role),
            )

    def parse(self, params: dict[str, Any] | list[Any] | None) -> BaseModel:
        """`params` as the method's model; ProtocolFault -32602 that names each wrong one by its path."""
        if isinstance(params, list):
            raise ProtocolFault(
                INVALID_PARAMS,
                f"{self.name}: params: an object with names, not an array",
                hint=f"names are {', '.join(self.params.model_fields) or '(none)'}",
            )
        try:
            # By way of JSON, because strict Python input would refuse an array where the model has a tuple.
            return self.params.model_validate_json(json.dumps(params) if params else "{}", strict=True)
        except ValidationError as error:
            raise _params_fault(self, error) from None


class Registry:
    """All methods of one daemon."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    @property
    def methods(self) -> Mapping[str, Method]:
        """By name, in the order of their names."""
        return dict(sorted(self._methods.items()))

    def method(
        self,
        name: str,
        *,
        role: str,
        params: type[ParamsT],
        result: type[BaseModel],
        summary: str | None = None,
    ) -> Callable[[Handler[ParamsT]], Handler[ParamsT]]:
        """Decorator: the coroutine function answers `name`. `summary` defaults to its docstring's first line.

        ValueError for a name given twice, a role that lets everyone in, params that accept unknown names.
        """
        needed = Role(role)

        def register(handler: Handler[ParamsT]) -> Handler[ParamsT]:
            text = summary or (handler.__doc__ or "").strip().partition("\n")[0]
            if name in self._methods:
                raise ValueError(f"{name}: registered twice")
            if needed is Role.NONE or params.model_config.get("extra") != "forbid" or not text:
                raise ValueError(f"{name}: wants a role above none, params with extra='forbid' and a summary")
            self._methods[name] = Method(name, needed, params, result, text, handler)
            return handler

        return register

    def find(self, name: str) -> Method:
        """The method of that name; ProtocolFault -32601 with the nearest names otherwise."""
        if method := self._methods.get(name):
            return method
        near = get_close_matches(name, self._methods, n=1)
        raise ProtocolFault(
            METHOD_NOT_FOUND,
            f"no method {name if name.isprintable() else ascii(name)}",
            hint=f"did you mean {near[0]}?" if near else "rpc.discover lists all methods",
        )

    def discover(self, *, version: str) -> dict[str, Any]:
        """The OpenRPC document of this table, as JSON values; the same for the same table.

        `x-role` is the least role that may call a method, `x-readonly` whether it only looks.
        """
        table = self.methods
        models = dict.fromkeys(pair for row in table.values() for pair in _modes(row))
        refs, schemas = models_json_schema(list(models), ref_template="#/components/schemas/{model}")
        shapes: dict[str, Any] = schemas.get("$defs", {})
        return {
            "openrpc": OPENRPC_VERSION,
            "info": {
                "title": "kvmd",
                "description": "One Linux KVM host and its guests. One JSON value per line on a Unix stream socket.",
                "version": version,
            },
            "methods": [_describe(row, refs, shapes) for row in table.values()],
            "components": {"schemas": dict(sorted(shapes.items()))},
        }


def _modes(row: Method) -> tuple[tuple[type[BaseModel], Any], ...]:
    return (row.params, "validation"), (row.result, "serialization")


def _describe(row: Method, refs: Mapping[Any, Mapping[str, Any]], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """One method object of the document (OpenRPC 1.3, "Method Object")."""
    (params_ref, result_ref) = (refs[key] for key in _modes(row))
    params = shapes[params_ref["$ref"].rpartition("/")[2]]
    required = params.get("required", [])
    described = []
    for name, schema in params.get("properties", {}).items():
        entry = {"name": name, "required": name in required, "schema": schema}
        if "description" in schema:
            entry["description"] = schema["description"]
        described.append(entry)
    return {
        "name": row.name,
        "summary": row.summary,
        "paramStructure": "by-name",
        "params": sorted(described, key=lambda entry: not entry["required"]),  # OpenRPC: required ones first
        "result": {"name": "result", "schema": dict(result_ref)},
        "x-role": str(row.role),
        "x-readonly": row.readonly,
    }


def _params_fault(method: Method, error: ValidationError) -> ProtocolFault:
    """pydantic's list of what is wrong as one error: the first in the message, all in the details."""
    faults = []
    hint = None
    for entry in error.errors(include_url=False, include_context=False, include_input=False)[:_FAULTS_SHOWN]:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"])
        path = "params" + (path if len(path) <= 200 and path.isprintable() else "[...]")
        message = entry["msg"]
        if entry["type"] == "extra_forbidden":
            message = "unknown name"
            if len(entry["loc"]) == 1 and hint is None:
                hint = _suggest(str(entry["loc"][0]), method)
        elif entry["type"] == "missing":
            message = "missing"
        faults.append({"path": path, "message": message})
    first = faults[0]
    return ProtocolFault(
        INVALID_PARAMS,
        f"{method.name}: {first['path']}: {first['message']}",
        hint=hint or f"names are {', '.join(method.params.model_fields) or '(none)'}",
        faults=faults,
    )


def _suggest(name: str, method: Method) -> str | None:
    near = get_close_matches(name[:64], method.params.model_fields, n=1)
    return f"did you mean {near[0]}?" if near else None
