"""The errors of the fields of a configuration, in plain words: what a value is and what it must be.

Knows pydantic's kinds of errors, so that no other module has to.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.section import HOST_NEEDED, NETWORK_NEEDED, SIZE_NEEDED, Location

_MAX_SHOWN = 60
"""Characters of a value in a message."""

_WORDS: dict[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "string_type": lambda value, context: f"is {shown(value)}; must be text, in quotes if it looks like a number",
    "string_too_short": lambda value, context: "must not be empty",
    "string_too_long": lambda value, context: f"has {len(value)} characters; at most {context['max_length']}",
    "bool_type": lambda value, context: f"is {shown(value)}; must be true or false",
    "bool_parsing": lambda value, context: f"is {shown(value)}; must be true or false",
    "int_type": lambda value, context: f"is {shown(value)}; must be a whole number",
    "int_parsing": lambda value, context: f"is {shown(value)}; must be a whole number",
    "int_parsing_size": lambda value, context: f"is {shown(value)}; it is too large",
    "int_from_float": lambda value, context: f"is {shown(value)}; must be a whole number",
    "float_type": lambda value, context: f"is {shown(value)}; must be a number",
    "float_parsing": lambda value, context: f"is {shown(value)}; must be a number",
    "finite_number": lambda value, context: f"is {shown(value)}; must be a finite number",
    "byte_size": lambda value, context: f"is {shown(value)}; {SIZE_NEEDED}",
    "byte_size_unit": lambda value, context: f"is {shown(value)}; {SIZE_NEEDED}",
    "ip_any_network": lambda value, context: f"is {shown(value)}; {NETWORK_NEEDED}",
    "tuple_type": lambda value, context: f"is {shown(value)}; must be a list",
    "too_short": lambda value, context: "must not be empty",
    "greater_than_equal": lambda value, context: f"is {shown(value)}; must be at least {_bound(context['ge'])}",
    "greater_than": lambda value, context: f"is {shown(value)}; must be more than {_bound(context['gt'])}",
    "less_than_equal": lambda value, context: f"is {shown(value)}; must be at most {_bound(context['le'])}",
    "value_error": lambda value, context: str(context["error"]),
    "missing": lambda value, context: "is required",
}

_PATTERNS = {
    "device": "must be cpu or cuda:N, such as cuda:0",
    "host": HOST_NEEDED,
    "listen": "must be HOST:PORT",
    "redis_url": "must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://",
}
_NAMES_ELSEWHERE = {
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "it is `kv_pool` of the unit, such as 24GiB"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size"), "it is `prefill_token_budget` of the model"),
    **dict.fromkeys(("enforce_eager", "disable_cuda_graph"), "it is `cuda_graphs: false` of the model"),
    **dict.fromkeys(("tensor_parallel_size", "tp_size"), "it is `tensor_parallel` of the unit"),
    "pipeline_parallel_size": "a unit computes on one GPU",
    **dict.fromkeys(("host", "port"), "it is `listen` of the mesh, HOST:PORT"),
    "context_length": "it is `max_model_len` of the model",
    "max_running_requests": "it is `max_num_seqs` of the model",
    "model_path": "it is `source` of the model",
    "num_scheduler_steps": "it is `continuous_decode_steps` of the model",
    "quantization": "weights are computed in `dtype`; of quantized files, GGUF is read",
    "page_size": "it is `block_size` of the model",
    "served_model_name": "it is `name` of the model",
    "ssl_certfile": "it is `cert` of `tls`",
    "ssl_keyfile": "it is `key` of `tls`",
    "ssl_ca_certs": "it is `client_ca` of `tls`",
    "swap_space": "it is `kv_swap` of the unit, such as 4GiB",
}
"""Settings of vLLM and SGLang that have another name here, or none."""
_VALUES_ELSEWHERE = {
    **dict.fromkeys(("half", "fp16"), "did you mean float16?"),
    **dict.fromkeys(("float", "fp32"), "did you mean float32?"),
    "vllm": "an engine on vLLM is not built yet",
}
"""Values of vLLM and SGLang that have another name here, or none."""
_NAME = "must begin with a letter or a digit and have only letters, digits, '.', '_' and '-'"


def field_errors(error: ValidationError, root: type[BaseModel]) -> list[tuple[Location, str | None]]:
    """(location, problem) of each error of one validation of ``root``. The problem is None if it follows from another.

    If an unknown field misspells a known one, the known one is listed too, with None.
    """
    items = [(tuple(item["loc"]), item) for item in error.errors()]
    locations = [location for location, _ in items]
    unknown = [location for location, item in items if item["type"] == "extra_forbidden"]
    names = {location: _meant(location, root) for location in unknown}
    misspelled = {(*location[:-1], name) for location, name in names.items() if name is not None}
    found: list[tuple[Location, str | None]] = [(location, None) for location in misspelled]
    for location, item in items:
        inside = any(len(other) > len(location) and other[: len(location)] == location for other in locations)
        if item["type"] == "too_short" and inside:  # pydantic counts the valid items
            continue
        if item["type"] != "missing" or location not in misspelled:
            found.append((location, _words(location, item, root, names.get(location))))
    return found


def _meant(location: Location, root: type[BaseModel]) -> str | None:
    """The field whose name is close to that of an unknown one."""
    section = section_at(location[:-1], root)
    names = list(section.model_fields) if section else []
    return closest(str(location[-1]), names)


def closest(text: str, choices: Iterable[str]) -> str | None:
    """The choice that ``text`` is probably a misspelling of."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(text[:_MAX_SHOWN].lower(), by_lower, n=1, cutoff=0.65)
    return by_lower[found[0]] if found else None


def section_at(location: Location, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section at ``location``, or None if the field there is not a section."""
    section: Any = root
    for part in location:
        if isinstance(part, int):
            section = next((one for one in get_args(section) if _is_section(one)), None)
        else:
            found = section.model_fields.get(part) if _is_section(section) else None
            section = found.annotation if found else None
            if isinstance(section, UnionType):  # a section that may be left out
                section = next(filter(_is_section, get_args(section)), None)
    return section if _is_section(section) else None


def shown(value: object) -> str:
    """A value for a message of one line."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 4 * _MAX_SHOWN:
        return "a number of too many digits"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _words(location: Location, item: Mapping[str, Any], root: type[BaseModel], meant: str | None) -> str:
    """``meant``: the known field that an unknown one misspells."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        if (elsewhere := _NAMES_ELSEWHERE.get(str(location[-1]))) is not None:
            return f"unknown field; {elsewhere}"
        if meant is not None:
            return f"unknown field; did you mean `{meant}`?"
        section = section_at(location[:-1], root)
        if location[-1] == "model" and section is ModelConfig:
            return "unknown field; it is `source`"
        return f"unknown field; known: {', '.join(section.model_fields if section else ())}"
    if kind == "literal_error":
        return _choices(value, context["expected"])
    if kind == "string_pattern_mismatch":
        return f"is {shown(value)}; {_PATTERNS.get(str(location[-1]), _NAME)}"
    if kind in ("model_type", "model_attributes_type"):
        section = section_at(location, root)
        names = list(section.model_fields) if section else []
        return f"is {shown(value)}; must be a mapping with fields like {', '.join(f'`{name}`' for name in names[:3])}"
    if kind in _WORDS:
        return _WORDS[kind](value, context)
    return f"is {shown(value)}; {item['msg']}"


def _choices(value: object, expected: str) -> str:
    """``expected`` is pydantic's list: 'a', 'b' or 'c'."""
    choices = [one.strip("'") for one in expected.replace(" or ", ", ").split(", ")]
    name = closest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {name}?" if name else ""
    if isinstance(value, str) and value in _VALUES_ELSEWHERE:
        hint = f"; {_VALUES_ELSEWHERE[value]}"
    return f"is {shown(value)}; must be {expected.replace(chr(39), '')}{hint}"


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
