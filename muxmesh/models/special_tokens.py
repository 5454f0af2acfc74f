"""The special tokens of a model, from all the side files that transformers reads, in its order of precedence.

Without `added_tokens_decoder` in `tokenizer_config.json`, `special_tokens_map.json` overrides its special tokens, and
`added_tokens.json` adds tokens. With `added_tokens_decoder`, both files are ignored. Tokens that only a class of
tokenizers in transformers knows, not a file, are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import described, read_json_object

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OLD_EXTRA = "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_TOKEN_ID = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """``variables``: the named tokens, which chat templates find. ``additions``: those that the tokenizer may lack."""

    variables: Mapping[str, str]
    additions: tuple[AddedToken, ...]


def read_special_tokens(folder: Path, config: FileFields, tokenizer: Tokenizer, pad_token: str | None) -> SpecialTokens:
    """Reads the special tokens of ``tokenizer``; ``config`` has the fields of `tokenizer_config.json`.

    ``pad_token``: that of the tokenizer's own file, if the other files name none.

    Raises ModelUnsupported, which names file and field.
    """
    found: dict[str, AddedToken] = dict(_named_tokens(config))
    extra = list(_extra_tokens(config, "extra_special_tokens")) or list(_extra_tokens(config, _OLD_EXTRA))
    decoder = config.inner("added_tokens_decoder")
    by_id = {_token_id(decoder, key): _token(decoder, key) for key in decoder.values}
    if "added_tokens_decoder" not in config.values:
        path = folder / "special_tokens_map.json"
        overriding = FileFields(path, read_json_object(path) or {})
        found |= _named_tokens(overriding)
        extra += _extra_tokens(overriding, "extra_special_tokens")
        special = {token.content for token in (*(found[name] for name in _NAMES if name in found), *extra)}
        by_id |= _added_tokens(folder, special)
        extra = extra or list(_extra_tokens(overriding, _OLD_EXTRA))
    if pad_token is not None and "pad_token" not in found:
        found["pad_token"] = AddedToken(pad_token, special=True)
    return SpecialTokens(
        {name: token.content for name, token in found.items()}, tuple(_additions(tokenizer, by_id, found, extra))
    )


def _additions(
    tokenizer: Tokenizer, by_id: Mapping[int, AddedToken], found: Mapping[str, AddedToken], extra: list[AddedToken]
) -> Iterator[AddedToken]:
    """Tokens that the tokenizer does not know as such, each once: those with ids first, in the order of these."""
    known = tokenizer.get_added_tokens_decoder().values()
    exact, contents = {repr(token) for token in known}, {token.content for token in known}
    for _, token in sorted(by_id.items(), key=lambda item: item[0]):
        if repr(token) not in exact:
            contents.add(token.content)
            token.special = token.special or any(token.content == one.content for one in found.values())
            yield token
    for token in (*found.values(), *extra):
        if token.content not in contents:
            contents.add(token.content)
            token.special = True
            yield token


def _named_tokens(fields: FileFields) -> Iterator[tuple[str, AddedToken]]:
    """The tokens under a name of their own; names beyond the usual ones end in `_token`, or are in a dictionary."""
    for name, value in fields.values.items():
        is_usual = name in _NAMES
        if value is not None and (is_usual or (name.endswith("_token") and isinstance(value, str))):
            yield name, _token(fields, name)
    if isinstance(fields.values.get("extra_special_tokens"), dict):
        inner = fields.inner("extra_special_tokens")
        for name in inner.values:
            yield name, _token(inner, name)


def _extra_tokens(fields: FileFields, name: str) -> Iterator[AddedToken]:
    """The tokens of a list without names of their own."""
    value = fields.values.get(name)
    if not value or isinstance(value, dict):
        return
    if not isinstance(value, list):
        raise fields.refuse(name, f"is {described(value)}; must be a list of tokens")
    inner = FileFields(fields.origin, {str(index): one for index, one in enumerate(value)}, f"{name}.")
    for index in inner.values:
        yield _token(inner, index)


def _added_tokens(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    path = folder / "added_tokens.json"
    fields = FileFields(path, read_json_object(path) or {})
    found = {}
    for content in fields.values:
        token_id = fields.needed_integer(content, 0, _MAX_TOKEN_ID)
        found[token_id] = AddedToken(content, normalized=content not in special, special=content in special)
    return found


def _token(fields: FileFields, name: str) -> AddedToken:
    """A token that is written as its text, or as an object with its text and flags."""
    value: Any = fields.values[name]
    if isinstance(value, str):
        return AddedToken(_checked(fields, name, value), special=True)
    inner = fields.inner(name)
    content = inner.text("content")
    if content is None:
        raise fields.refuse(name, f"is {described(value)}; must be a string, or an object with `content`")
    flags = {flag: inner.flag(flag, False) for flag in _FLAGS if inner.values.get(flag) is not None}
    return AddedToken(_checked(inner, "content", content), **flags)


def _checked(fields: FileFields, name: str, content: str) -> str:
    if not content.isprintable() and any("\ud800" <= one <= "\udfff" for one in content):
        raise fields.refuse(name, "has a surrogate code point, which is no Unicode")
    return content


def _token_id(decoder: FileFields, key: str) -> int:
    if not key.isascii() or not key.isdigit() or int(key[:20]) > _MAX_TOKEN_ID:
        raise decoder.refuse(key, f"must be a token id, up to {_MAX_TOKEN_ID}")
    return int(key)
