"""Tokenizer and chat template of one model, over Hugging Face `tokenizers` and `chat_template`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from muxmesh.errors import InvalidRequest, MeshError, ModelUnsupported
from muxmesh.models.chat_template import ChatTemplate
from muxmesh.models.chat_template_files import find_chat_template
from muxmesh.models.detokenizer import Detokenizer, TokenPieces, special_token_ids
from muxmesh.models.file_fields import FileFields
from muxmesh.models.model_files import MAX_TOKENIZER_BYTES, read_json_object
from muxmesh.models.special_tokens import read_special_tokens
from muxmesh.models.token_bound import TokenBound, token_bound
from muxmesh.models.token_texts import TokenTexts
from muxmesh.models.tokenizer_class import apply_tokenizer_class

_SIM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class TextModel:
    """Tokenizer and chat template of one model. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None, eos_token: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = None if eos_token is None else tokenizer.token_to_id(eos_token)
        """The tokenizer's own end of sequence. As in vLLM it ends an output, like those of the model's configs."""
        self._pieces = {skip: TokenPieces(tokenizer, skip) for skip in (False, True)}
        self.token_texts = TokenTexts(self._pieces[False])
        self._special_token_ids = special_token_ids(tokenizer)
        longest_first = sorted(self._special_token_ids, key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)))
        self.chat_template = chat_template

    @property
    def has_chat_template(self) -> bool:
        """True if conversations can be rendered. Waits until the template is compiled."""
        return self.chat_template is not None and self.chat_template.problem is None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``. Releases the GIL meanwhile. Raises InvalidRequest if it cannot be encoded."""
        with _failing_as(_cannot_be_encoded):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def certainly_exceeds(self, text: str, num_tokens: float) -> bool:
        """True if ``text`` has more than ``num_tokens`` tokens for certain. Much faster than `encode`."""
        return self._bound is not None and self._bound.is_exceeded(text, num_tokens)

    @cached_property
    def _bound(self) -> TokenBound | None:
        """Built for the first long prompt: it reads the whole vocabulary."""
        return token_bound(self._tokenizer)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ``token_ids``, the same as that of an output; see `Detokenizer` for invalid UTF-8.

        Raises InvalidRequest if they cannot be decoded.
        """
        with _failing_as(_cannot_be_decoded):
            detokenizer = self.detokenizer(skip_special_tokens)
            return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

    def only_special_tokens(self, text: str) -> dict[str, int]:
        """Ids of the special tokens in ``text`` by their text, if it consists of these and of whitespace; else none."""
        if not self._special_token_ids or self._special_token.sub("", text).strip():
            return {}
        return {token: self._special_token_ids[token] for token in self._special_token.findall(text)}

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation as prompt text that ends where the reply of the assistant begins.

        Raises InvalidRequest if the model has no usable chat template (`chat`), or if the template rejects the
        conversation or exceeds its budget (`chat.messages`).
        """
        return self._template().render(messages)

    def start_chat(self) -> None:
        """Starts to compile the chat template, if there is one. Raises Unavailable."""
        if self.chat_template is not None:
            self.chat_template.start()

    def submit_chat(self, messages: Sequence[Mapping[str, str]]) -> Future[str]:
        """`render_chat` in a thread of this model's template."""
        return self._template().submit(messages)

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequest("chat", "this model has no chat template; send `text` or `token_ids`")
        return self.chat_template

    def detokenizer(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """Returns a new incremental detokenizer for the output that follows ``prompt_token_ids``."""
        return Detokenizer(self._pieces[skip_special_tokens], prompt_token_ids)


def _cannot_be_encoded(problem: str) -> InvalidRequest:
    return InvalidRequest("text", f"cannot be encoded by the model's tokenizer: {problem}")


def _cannot_be_decoded(problem: str) -> InvalidRequest:
    return InvalidRequest("token_ids", f"cannot be decoded by the model's tokenizer: {problem}")


def load_text_model(folder: Path | None) -> TextModel:
    """Loads the tokenizer and the chat template of a model folder; without a folder, those of the sim engine.

    Raises ModelUnsupported if the folder has no ``tokenizer.json``, or if a file is damaged. A template that cannot be
    compiled is no such error: `TextModel.chat_template.problem` has it.
    """
    if folder is None:
        return TextModel(byte_tokenizer(), ChatTemplate(_SIM_CHAT_TEMPLATE, {}))
    tokenizer, pad_token = load_tokenizer(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    config = FileFields(path, read_json_object(path) or {})
    apply_tokenizer_class(folder, config, tokenizer)
    special_tokens = read_special_tokens(folder, config, tokenizer, pad_token)
    tokenizer.add_tokens(list(special_tokens.additions))
    tokenizer.encode_special_tokens = config.flag("split_special_tokens", False)
    source, problem = find_chat_template(folder, config)
    template = None
    if source is not None or problem is not None:
        template = ChatTemplate(source or "", special_tokens.variables, problem)
    return TextModel(tokenizer, template, special_tokens.variables.get("eos_token"))


def load_tokenizer(path: Path) -> tuple[Tokenizer, str | None]:
    """Loads a ``tokenizer.json``; returns the tokenizer and the token that it would pad with, if any.

    As in transformers, it does not truncate and pad. Raises ModelUnsupported for any other content, in one line.
    """
    if read_json_object(path, MAX_TOKENIZER_BYTES) is None:
        raise ModelUnsupported(f"{path.parent}: has no tokenizer.json; convert the tokenizer to the `fast` format")
    with refusing_tokenizer(path), _without_stderr():
        tokenizer = Tokenizer.from_file(str(path))
        padding = tokenizer.padding
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("a b", add_special_tokens=True).ids)
    return tokenizer, padding["pad_token"] if padding else None


def refusing_tokenizer(path: Path) -> AbstractContextManager[None]:
    """Turns what `tokenizers` raises in a block into ModelUnsupported."""
    return _failing_as(
        lambda problem: ModelUnsupported(f"{path}: is no tokenizer that `tokenizers` can read: {problem}")
    )


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards what is written to file descriptor 2: `tokenizers` writes a traceback before it raises a panic."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _failing_as(error_of: Callable[[str], MeshError]) -> Iterator[None]:
    """Turns what `tokenizers` raises into a MeshError: bare exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise error_of(" ".join(str(error).split())[:200]) from error


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
