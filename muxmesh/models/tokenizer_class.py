"""What a class of tokenizers in transformers changes in the tokenizer of a file. Knows no special tokens.

Of the classes that models here name, only `LlamaTokenizer` changes one: it replaces how text is split and how spaces
are written at the beginning of a text and after special tokens, whatever the file says.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import read_json_object
from muxmesh.models.tokenizer_steps import component_steps

_SPACE = "▁"
_OWN_CLASS = {"mistral", "qwen2"}
"""Model types for which transformers ignores the named class."""


def apply_tokenizer_class(folder: Path, config: FileFields, tokenizer: Tokenizer) -> None:
    """Changes ``tokenizer`` as the class that its model names does; ``config`` is its `tokenizer_config.json`.

    The class that `config.json` names counts if ``config`` names none. Raises ModelUnsupported, which names the field.
    """
    path = folder / "config.json"
    model = FileFields(path, read_json_object(path) or {})
    name = config.text("tokenizer_class") or model.text("tokenizer_class") or ""
    if name.removesuffix("Fast") != "LlamaTokenizer" or model.text("model_type") in _OWN_CLASS:
        return
    if isinstance(tokenizer.model, models.BPE) and not _is_byte_level(tokenizer):
        starts_with_space = config.flag("add_prefix_space", True)
        _apply_llama(tokenizer, starts_with_space, after_special_tokens=config.flag("legacy", False))


def _apply_llama(tokenizer: Tokenizer, starts_with_space: bool, after_special_tokens: bool) -> None:
    """A text starts with a space, which its decoded text lacks; with ``after_special_tokens`` each part does."""
    scheme = "never" if not starts_with_space else "always" if after_special_tokens else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if starts_with_space else steps)
    tokenizer.model.fuse_unk = True
    tokenizer.model.byte_fallback = True


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """True if a step before the model, or the decoder, is ByteLevel."""
    components = (tokenizer.pre_tokenizer, tokenizer.decoder)
    return any(step["type"] == "ByteLevel" for one in components for step in component_steps(one))
