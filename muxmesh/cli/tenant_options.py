"""The options of `muxmesh tenant`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from muxmesh.cli.runtime_options import add_runtime_options
from muxmesh.tenants.tenant import MAX_LIMIT, MAX_WEIGHT, MIN_WEIGHT

NONE = "none"
"""The value of an option that removes a limit."""
LIMITS = {
    "requests_per_minute": "requests per minute; a minute without requests saves up as many",
    "tokens_per_minute": "prompt and output tokens per minute; a minute without requests saves up as many",
    "max_concurrent_requests": "requests in progress at the same time",
    "max_request_tokens": "tokens of one request: its prompt and its longest possible outputs",
}
DEFAULT_GRACE_S = 3600.0
DESCRIPTION = (
    "Manage the tenants of a running mesh with `access: {mode: keys}`: their API keys and what they may use. Routers "
    "know of a change within about a second."
)


def add_to(parser: argparse.ArgumentParser, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the actions to ``parser``."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def command(name: str, text: str, named: str | None = None) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        action.set_defaults(module="tenant", action=name)
        if named is not None:
            action.add_argument("name", metavar="NAME", help=named)
        add_runtime_options(action)
        add_json(action)
        return action

    add = command("add", "Add a tenant and print its API key, which is shown once.", "letters, digits, `.`, `_`, `-`")
    _add_settings(add)
    _add_lifetime(add, "--expires-in", "the key", None)
    command("list", "List the tenants with their limits. API keys are not kept and cannot be shown.")
    usage = command("usage", "Show what tenants have used, and what is left of their limits.")
    usage.add_argument("name", nargs="?", metavar="NAME", help="only this tenant")
    _add_settings(command("set", "Change limits of a tenant; those that are not named stay.", "a tenant"))
    command("remove", "Remove a tenant: its keys are refused, its running requests finish.", "a tenant")
    rotate = command("rotate", "Print a new API key of a tenant; its earlier keys expire.", "a tenant")
    _add_lifetime(rotate, "--grace", "earlier keys", DEFAULT_GRACE_S)
    _add_lifetime(rotate, "--expires-in", "the new key", None)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for name, text in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_limit, metavar="N", help=f"at most N {text}; `{NONE}`: no limit"
        )
    parser.add_argument(
        "--best-priority", type=_priority, metavar="P",
        help=f"the lowest `priority` that its requests may have, and that of those without one; `{NONE}`: any",
    )  # fmt: skip
    parser.add_argument(
        "--weight", type=_weight, metavar="W", help="its share of a busy unit, relative to other tenants (default: 1)"
    )
    parser.add_argument(
        "--operator", action=argparse.BooleanOptionalAction, dest="is_operator",
        help="whether it may see the state of the mesh (`muxmesh status`)",
    )  # fmt: skip


def _add_lifetime(parser: argparse.ArgumentParser, option: str, what: str, default_s: float | None) -> None:
    default = "never" if default_s is None else f"{default_s:g}"
    parser.add_argument(
        option, type=_seconds, default=default_s, metavar="SECONDS",
        help=f"after how many seconds {what} expire{'s' if what.endswith('key') else ''} (default: {default})",
    )  # fmt: skip


def _limit(text: str) -> int | str:
    if text == NONE:
        return NONE
    if text.isascii() and text.isdigit() and 0 < int(text) <= MAX_LIMIT:
        return int(text)
    raise argparse.ArgumentTypeError(f"is {text!r}; a whole number from 1 to {MAX_LIMIT}, or {NONE}")


def _priority(text: str) -> int | str:
    if text == NONE:
        return NONE
    try:
        value = int(text)
    except ValueError:
        value = MAX_LIMIT + 1
    if abs(value) <= MAX_LIMIT:
        return value
    raise argparse.ArgumentTypeError(f"is {text!r}; a whole number, or {NONE}")


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if MIN_WEIGHT <= value <= MAX_WEIGHT:
        return value
    raise argparse.ArgumentTypeError(f"is {text!r}; a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1e9:
        return value
    raise argparse.ArgumentTypeError(f"is {text!r}; seconds, from 0 to 1e9")
