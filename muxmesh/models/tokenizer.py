"""Tokenizer and chat template of one model, over Hugging Face `tokenizers` and jinja2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from muxmesh.errors import InvalidRequest, ModelUnsupported
from muxmesh.models.detokenizer import Detokenizer, TokenPieces, special_token_ids
from muxmesh.models.model_files import read_json_object
from muxmesh.models.token_texts import TokenTexts

_SIM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class TextModel:
    """Tokenizer and chat template of one model. Thread-safe.

    ``special_tokens``: variables of the template, `bos_token` and `eos_token`.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._pieces = {skip: TokenPieces(tokenizer, skip) for skip in (False, True)}
        self.token_texts = TokenTexts(self._pieces[False])
        self._special_token_ids = special_token_ids(tokenizer)
        longest_first = sorted(self._special_token_ids, key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)))
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(chat_template) if chat_template else None

    @property
    def has_chat_template(self) -> bool:
        """True if `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``. Releases the GIL meanwhile."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ``token_ids``; invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def only_special_tokens(self, text: str) -> dict[str, int]:
        """Ids of the special tokens in ``text`` by their text, if it consists of these and of whitespace; else none."""
        if not self._special_token_ids or self._special_token.sub("", text).strip():
            return {}
        return {token: self._special_token_ids[token] for token in self._special_token.findall(text)}

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation as prompt text that ends where the reply of the assistant begins.

        Raises InvalidRequest if the model has no chat template (`chat`) or the template rejects the conversation
        (`chat.messages`).
        """
        if self._template is None:
            raise InvalidRequest("chat", "this model has no chat template; send `text` or `token_ids`")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except jinja2.TemplateError as error:
            raise InvalidRequest("chat.messages", f"rejected by the model's chat template: {error}") from error

    def detokenizer(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """Returns a new incremental detokenizer for the output that follows ``prompt_token_ids``."""
        return Detokenizer(self._pieces[skip_special_tokens], prompt_token_ids)


def load_text_model(folder: Path | None) -> TextModel:
    """Loads the tokenizer and the chat template of a model folder; without a folder, those of the sim engine.

    Raises ModelUnsupported if the folder has no ``tokenizer.json``, or if a JSON file or the chat template is damaged.
    """
    if folder is None:
        return TextModel(byte_tokenizer(), _SIM_CHAT_TEMPLATE, {})
    path = folder / "tokenizer.json"
    if read_json_object(path) is None:  # `tokenizers` would raise a bare Exception for damaged JSON
        raise ModelUnsupported(f"{folder}: has no tokenizer.json; convert the tokenizer to the `fast` format")
    config = read_json_object(folder / "tokenizer_config.json") or {}
    special_tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # transformers does not apply what the file has of these unless it is asked to
    tokenizer.no_padding()
    try:
        return TextModel(tokenizer, _chat_template(folder, config), special_tokens)
    except jinja2.TemplateError as error:
        raise ModelUnsupported(f"{folder}: the chat template is invalid: {error}") from error


def byte_tokenizer() -> Tokenizer:
    """Builds a tokenizer with three special tokens (ids 0 to 2) and one token for each byte (ids 3 to 258).

    The sim engine and the tests use it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|eos|>", "<|start|>", "<|pad|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates with names
        return next((str(entry["template"]) for entry in template if entry.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else (token or "")


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
