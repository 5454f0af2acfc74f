"""Text to tokens and back: HF `tokenizers`, the model's own chat template, and an incremental detokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from muxmesh.errors import InvalidRequest, ModelUnsupported

_CONTEXT_TOKENS = 6
_SIM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class TextModel:
    """Tokenizer and chat template of one model. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, special: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(chat_template) if chat_template else None

    @property
    def has_chat_template(self) -> bool:
        """True if `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``. Releases the GIL while it works."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, up to where the assistant speaks.

        Raises InvalidRequest(chat) if the model has no template or the template refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequest("chat", "this model has no chat template; send `text` or `token_ids`")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            raise InvalidRequest("chat.messages", f"the model's chat template refuses them: {error}") from error

    def detokenizer(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """A fresh incremental detokenizer for what follows ``prompt_token_ids``."""
        return Detokenizer(self._tokenizer, skip_special_tokens, prompt_token_ids)


class Detokenizer:
    """Turns tokens into text as they come, never emitting half a UTF-8 character.

    It begins with the end of the prompt, of which it gives out nothing: decoders drop the space that text begins
    with, and an answer does not begin a text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.feed(token_id)
        self._pending.clear()

    def feed(self, token_id: int) -> str:
        """Text that ``token_id`` completes; empty while a character is open."""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """What is left at the end of the answer: an open character becomes U+FFFD."""
        rest = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
        self._pending.clear()
        return rest


def load_text_model(folder: Path | None) -> TextModel:
    """Tokenizer and template of a model folder; without a folder the byte tokenizer of the sim engine.

    Raises ModelUnsupported if the folder has no ``tokenizer.json``.
    """
    if folder is None:
        return TextModel(byte_tokenizer(), _SIM_CHAT_TEMPLATE, {})
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelUnsupported(f"{folder}: has no tokenizer.json; convert the tokenizer to the fast format")
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    return TextModel(Tokenizer.from_file(str(path)), _chat_template(folder, config), special)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte (ids 3..258) after three special ones: enough for the sim engine and for tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|eos|>", "<|start|>", "<|pad|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        return next((str(entry["template"]) for entry in template if entry.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else (token or "")


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
