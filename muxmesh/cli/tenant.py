"""`muxmesh tenant add|list|set|remove|usage|rotate`: the tenants of a running mesh, in its Redis."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from muxmesh.cli.common import print_json
from muxmesh.cli.runtime_lookup import find_runtime
from muxmesh.cli.tenant_options import LIMITS, NONE
from muxmesh.cli.text_table import print_table
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.section import NAME_PATTERN
from muxmesh.durations import duration_text
from muxmesh.errors import InvalidRequest
from muxmesh.redis_connection import REDIS_ERRORS, open_redis
from muxmesh.tenants.api_key import hash_of_api_key, new_api_key
from muxmesh.tenants.quota_book import QuotaBook, TenantUsage
from muxmesh.tenants.tenant import MAX_NAME
from muxmesh.tenants.tenant_directory import TenantDirectory
from muxmesh.tenants.tenant_record import MAX_KEYS, ApiKeyRecord, LimitsRecord, TenantRecord, is_tenant_name

_ID_BITS = 64
_LIMIT_NAMES = (*LIMITS, "best_priority")
_OPERATOR, _WEIGHT = "is_operator", "weight"


@dataclasses.dataclass(frozen=True, slots=True)
class _Mesh:
    """The Redis of a mesh, and what the commands take from outside. ``rng`` is one for secrets."""

    directory: TenantDirectory
    book: QuotaBook
    rng: random.Random
    unix_s: float


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand in ``arguments.action``; returns the exit code.

    Raises Unavailable if there is no such mesh or its Redis does not respond, InvalidRequest for a tenant that there is
    not, or is already.
    """
    actions: dict[str, Callable[[_Mesh, argparse.Namespace], Awaitable[None]]] = {
        "add": _add, "list": _list, "set": _set, "remove": _remove, "usage": _usage, "rotate": _rotate,
    }  # fmt: skip
    runtime = find_runtime(arguments)
    if runtime.config.access.mode == "open":
        print(
            "muxmesh: the mesh has access.mode: open, so no request needs an API key; set access: {mode: keys} in "
            "mesh.yaml",
            file=sys.stderr,
        )

    async def act() -> None:
        async with _opened(runtime) as mesh:
            await actions[arguments.action](mesh, arguments)

    asyncio.run(act())
    return 0


@contextlib.asynccontextmanager
async def _opened(runtime: MeshRuntime) -> AsyncIterator[_Mesh]:
    client, rng = open_redis(runtime.redis_url), random.SystemRandom()
    mesh_id = runtime.config.mesh_id
    try:
        directory = TenantDirectory(client, mesh_id, rng)
        yield _Mesh(directory, QuotaBook(client, mesh_id), rng, SystemClock().unix_s())
    finally:
        with contextlib.suppress(*REDIS_ERRORS):
            await client.aclose()


async def _add(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    if not is_tenant_name(arguments.name):
        raise InvalidRequest(
            "name", f"is {arguments.name!r}; at most {MAX_NAME} of the characters {NAME_PATTERN[1:-1]}"
        )
    key, record_of_key = _new_key(mesh, arguments.expires_in)
    record = TenantRecord(
        name=arguments.name,
        tenant_id=f"{mesh.rng.getrandbits(_ID_BITS):016x}",
        created_at_unix_s=mesh.unix_s,
        keys=(record_of_key,),
    )
    await mesh.directory.add(_with_settings(record, arguments))
    _print_key(arguments, key, f"tenant {record.name} is added")


async def _set(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    if not _settings(arguments):
        raise InvalidRequest("set", "changes nothing: name a limit, --weight or --operator")
    record = await mesh.directory.change(arguments.name, lambda found: _with_settings(found, arguments))
    if arguments.json:
        print_json(_facts(record, mesh.unix_s))
    else:
        print(f"muxmesh: tenant {record.name}: {_settings_text(record)}")


async def _rotate(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    key, record_of_key = _new_key(mesh, arguments.expires_in)
    until_unix_s = mesh.unix_s + arguments.grace

    def changed(record: TenantRecord) -> TenantRecord:
        valid = [one for one in record.keys if one.is_valid(mesh.unix_s)]
        kept = [_expiring(one, until_unix_s) for one in valid] if arguments.grace > 0 else []
        return record.model_copy(update={"keys": (record_of_key, *kept[: MAX_KEYS - 1])})

    record = await mesh.directory.change(arguments.name, changed)
    num_old = len(record.keys) - 1
    expire = f"; earlier keys expire in {duration_text(arguments.grace)}" if num_old else "; earlier keys are refused"
    _print_key(arguments, key, f"tenant {record.name} has a new key{expire}")


async def _remove(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    record = await mesh.directory.remove(arguments.name)
    if record is not None:
        await mesh.book.remove(record.tenant_id)
    if arguments.json:
        print_json({"name": arguments.name, "removed": True})
    else:
        print(f"muxmesh: tenant {arguments.name} is removed; its keys are refused within about a second")


async def _list(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    copy = await mesh.directory.read()
    records = [copy.records[name] for name in sorted(copy.records)]
    _report_unreadable(copy.unreadable)
    if arguments.json:
        print_json([_facts(record, mesh.unix_s) for record in records])
        return
    if not records:
        print("muxmesh: there are no tenants; `muxmesh tenant add NAME` adds one")
        return
    header = ("TENANT", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "LONGEST", "PRIORITY", "WEIGHT", "KEYS", "OPERATOR")
    print_table(header, (_row(record, mesh.unix_s) for record in records))


async def _usage(mesh: _Mesh, arguments: argparse.Namespace) -> None:
    copy = await mesh.directory.read()
    _report_unreadable(copy.unreadable)
    names = sorted(copy.records) if arguments.name is None else [arguments.name]
    for name in names:
        if name not in copy.records:
            raise InvalidRequest("name", f"there is no tenant {name!r}; `muxmesh tenant list` shows them")
    usages = [(name, await mesh.book.usage(copy.records[name].tenant)) for name in names]
    if arguments.json:
        print_json([{"name": name, **dataclasses.asdict(usage)} for name, usage in usages])
        return
    header = (
        "TENANT", "REQUESTS", "PROMPT TOKENS", "OUTPUT TOKENS", "REFUSED", "RUNNING", "RESERVED TOKENS",
        "REQUESTS LEFT", "TOKENS LEFT", "LAST USED",
    )  # fmt: skip
    print_table(header, (_usage_row(name, usage, mesh.unix_s) for name, usage in usages))


def _new_key(mesh: _Mesh, expires_in_s: float | None) -> tuple[str, ApiKeyRecord]:
    key = new_api_key(mesh.rng)
    expires_at = None if expires_in_s is None else mesh.unix_s + expires_in_s
    return key, ApiKeyRecord(hash=hash_of_api_key(key), created_at_unix_s=mesh.unix_s, expires_at_unix_s=expires_at)


def _expiring(key: ApiKeyRecord, unix_s: float) -> ApiKeyRecord:
    before = key.expires_at_unix_s
    return key.model_copy(update={"expires_at_unix_s": unix_s if before is None else min(before, unix_s)})


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command names."""
    names = (*_LIMIT_NAMES, _WEIGHT, _OPERATOR)
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _with_settings(record: TenantRecord, arguments: argparse.Namespace) -> TenantRecord:
    named = _settings(arguments)
    limits = {name: None if value == NONE else value for name, value in named.items() if name in _LIMIT_NAMES}
    others = {name: value for name, value in named.items() if name not in _LIMIT_NAMES}
    changed = {**record.limits.model_dump(), **limits}
    return record.model_copy(update={**others, "limits": LimitsRecord(**changed)})


def _print_key(arguments: argparse.Namespace, key: str, text: str) -> None:
    """The key alone goes to standard output, so that a script can take it."""
    if arguments.json:
        print_json({"name": arguments.name, "api_key": key})
        return
    print(f"muxmesh: {text}. Its API key, which is shown only now:", file=sys.stderr, flush=True)
    print(key, flush=True)


def _facts(record: TenantRecord, unix_s: float) -> dict[str, Any]:
    return {
        "name": record.name,
        **record.limits.model_dump(),
        "weight": record.weight,
        "is_operator": record.is_operator,
        "created_at_unix_s": record.created_at_unix_s,
        "num_valid_keys": _num_valid(record, unix_s),
        "key_expiries_unix_s": [key.expires_at_unix_s for key in record.keys if key.is_valid(unix_s)],
    }


def _row(record: TenantRecord, unix_s: float) -> tuple[object, ...]:
    limits = ["-" if value is None else value for value in record.limits.model_dump().values()]
    keys = _num_valid(record, unix_s)
    return (record.name, *limits, f"{record.weight:g}", keys, "yes" if record.is_operator else "no")


def _num_valid(record: TenantRecord, unix_s: float) -> int:
    return sum(key.is_valid(unix_s) for key in record.keys)


def _settings_text(record: TenantRecord) -> str:
    limits = {name: value for name, value in record.limits.model_dump().items() if value is not None}
    parts = [f"--{name.replace('_', '-')} {value}" for name, value in limits.items()]
    return ", ".join([*parts, f"--weight {record.weight:g}", "--operator" if record.is_operator else "--no-operator"])


def _usage_row(name: str, usage: TenantUsage, unix_s: float) -> tuple[object, ...]:
    last = usage.last_used_unix_s
    return (
        name, usage.requests, usage.prompt_tokens, usage.output_tokens, usage.refused, usage.open_requests,
        usage.reserved_tokens, *("-" if left is None else left for left in (usage.requests_left, usage.tokens_left)),
        "never" if last is None else f"{duration_text(max(0.0, unix_s - last))} ago",
    )  # fmt: skip


def _report_unreadable(names: tuple[str, ...]) -> None:
    for name in names:
        print(
            f"muxmesh: the record of tenant {name!r} is of another version of MuxMesh, or damaged: its keys are "
            "refused. `muxmesh tenant remove` and `add` make a new one",
            file=sys.stderr,
        )
