"""Builds a Hugging Face `tokenizers` tokenizer from the fields of a GGUF file.

Supports two kinds: byte-level BPE with merges (`gpt2`), where `tokenizer.ggml.pre` names how text is split before
merging, and SentencePiece BPE with scores (`llama`). Knows no files and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from muxmesh.models.file_fields import FileFields
from muxmesh.quoting import named, quoted

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "▁"
_MAX_TOKEN = 4096
"""Characters of a token. SentencePiece merges are found by cutting each token everywhere."""
_ENDINGS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
"""Control tokens that end an output even if the file names another end of sequence."""

# Patterns that split text before merging, from the tokenizer files of the models.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How one value of `tokenizer.ggml.pre` splits and normalizes text."""

    pattern: str
    single_digits: bool = False
    nfc: bool = False
    whole_words_first: bool = False
    """A word that is in the vocabulary becomes that token without merging."""
    starts_with_bos: bool = False


_LLAMA3 = _Split(_MODERN_SPLIT % r"\p{N}{1,3}", whole_words_first=True, starts_with_bos=True)
_SPLITS = {
    "gpt-2": _Split(_GPT2_SPLIT),
    "smollm": _Split(_GPT2_SPLIT, single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Split(_MODERN_SPLIT % r"\p{N}", nfc=True),
}


def check_tokenizer(fields: FileFields) -> None:
    """Raises ModelUnsupported if `build_tokenizer` does not know the kind, or if one of its fields is not sound."""
    kind, pre = fields.text("tokenizer.ggml.model"), fields.text("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or pre not in _SPLITS):
        known = ", ".join(["llama", *(f"gpt2/{name}" for name in _SPLITS)])
        raise fields.refuse(
            "tokenizer.ggml.model", f"tokenizer {named(f'{kind}/{pre}')} is not supported; supported: {known}"
        )
    count = len(_list(fields, "tokens", str))
    if not count:
        raise fields.refuse("tokenizer.ggml.tokens", "is empty")
    for token in fields.values["tokenizer.ggml.tokens"]:
        if len(token) > _MAX_TOKEN:
            problem = f"has a token of {len(token)} characters; at most {_MAX_TOKEN}"
            raise fields.refuse("tokenizer.ggml.tokens", problem)
    if "tokenizer.ggml.token_type" in fields.values:
        _list(fields, "token_type", int, count)
    if kind == "llama":
        if not all(map(math.isfinite, _list(fields, "scores", float, count))):
            raise fields.refuse("tokenizer.ggml.scores", "has NaN or infinity")
    else:
        _list(fields, "merges", str)
    for name in ("bos", "eos", "eot", "eom"):
        fields.integer(f"tokenizer.ggml.{name}_token_id", 0, count - 1)
    for name in ("add_bos_token", "add_space_prefix"):
        fields.flag(f"tokenizer.ggml.{name}", False)


def _list(fields: FileFields, name: str, kind: type, count: int | None = None) -> list[Any]:
    """A list of ``count`` values of a kind, or of any number of them but none."""
    value = fields.values.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise fields.refuse(f"tokenizer.ggml.{name}", "is missing")
    if not isinstance(value, list) or not all(type(one) is kind for one in value):
        raise fields.refuse(f"tokenizer.ggml.{name}", f"must be a list of values of type {kind.__name__}")
    if count is not None and len(value) != count:
        raise fields.refuse(f"tokenizer.ggml.{name}", f"has {len(value)} entries; there are {count} tokens")
    return value


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from fields that `check_tokenizer` accepts.

    Raises KeyError for a missing field; TypeError, ValueError or IndexError for fields that contradict each other.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if fields["tokenizer.ggml.model"] == "llama":
        tokenizer, starts_with_bos = _sentencepiece(fields, tokens, kinds), True
    else:
        split = _SPLITS[fields["tokenizer.ggml.pre"]]
        tokenizer, starts_with_bos = _byte_level(fields, tokens, split), split.starts_with_bos
    with_kinds = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, kind in with_kinds if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in with_kinds if kind == _USER_DEFINED])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", starts_with_bos):
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, bos)]
        )
    return tokenizer


def eos_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end an output, without duplicates; the end of sequence that the file names comes first."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found += [token_id for token_id, text in enumerate(tokens) if kinds[token_id] == _CONTROL and text in _ENDINGS]
    return list(dict.fromkeys(int(token_id) for token_id in found if token_id is not None))


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], split: _Split) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"merge {quoted(' '.join(merge))} has a part or a result that is not in the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words_first))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []),
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """SentencePiece BPE as a merge list.

    SentencePiece joins the pair whose joint piece has the highest score. BPE does the same if its merges are ordered by
    the score of their results.
    """
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    ranked = sorted(
        (token_id for token_id, kind in enumerate(kinds) if kind not in {_UNKNOWN, _CONTROL, _BYTE}),
        key=lambda token_id: -scores[token_id],
    )
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[token_id] for token_id in ranked)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds)
    )
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    pieces: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer
