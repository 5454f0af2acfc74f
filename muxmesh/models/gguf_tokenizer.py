"""The tokenizer inside a GGUF file as Hugging Face's `tokenizers` has it.

Two kinds: byte-level BPE with merges (`gpt2`), whose way of splitting text is named by `tokenizer.ggml.pre`, and
SentencePiece BPE with scores (`llama`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from muxmesh.errors import ModelUnsupported

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "▁"
_ENDINGS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
"""Control tokens that end an answer, whatever the file calls its end of sequence."""

# How each kind splits text before merging: facts of the models' own tokenizer files.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """One `tokenizer.ggml.pre`."""

    pattern: str
    single_digits: bool = False
    nfc: bool = False
    whole_words_first: bool = False
    """A word that is a token is that token, whatever the merges would make of it."""
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


def check_tokenizer(fields: Mapping[str, Any], origin: str) -> None:
    """Raises ModelUnsupported, naming ``origin``, if `build_tokenizer` does not know the kind."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "llama" or (kind == "gpt2" and pre in _SPLITS):
        return
    known = ", ".join(["llama", *(f"gpt2/{name}" for name in _SPLITS)])
    raise ModelUnsupported(f"{origin}: tokenizer {kind}/{pre} is not supported; supported: {known}")


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file that `check_tokenizer` accepts."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if fields["tokenizer.ggml.model"] == "llama":
        tokenizer, starts_with_bos = _sentencepiece(fields, tokens, kinds), True
    else:
        split = _SPLITS[fields["tokenizer.ggml.pre"]]
        tokenizer, starts_with_bos = _byte_level(fields, tokens, split), split.starts_with_bos
    named = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, k in named if k == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, k in named if k == _USER_DEFINED])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", starts_with_bos):
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, bos)]
        )
    return tokenizer


def eos_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer; the file's own end of sequence first."""
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
            raise ValueError(f"merge {' '.join(merge)!r} is not of tokens of the vocabulary")
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
    """Merging the pair of the highest score is BPE with merges in the order of the scores of what they make."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    ranked = sorted(
        (token_id for token_id, kind in enumerate(kinds) if kind not in {_UNKNOWN, _CONTROL, _BYTE}),
        key=lambda token_id: -scores[token_id],
    )
    merges = [
        (token[:at], token[at:])
        for token in (tokens[token_id] for token_id in ranked)
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
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
