from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers.processors import TemplateProcessing

from muxmesh.errors import InvalidRequest
from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from router.generation import ChatMessage, ChatPrompt, TextPrompt, TokensPrompt
from router.prompt_tokenizer import PromptTokenizer
from tests.support.pipeline_parts import served_model, tokens_of

CHAT = ChatPrompt((ChatMessage("user", "hi"),))


@pytest.fixture
def tokenizer() -> Iterator[PromptTokenizer]:
    with ThreadPoolExecutor(1) as threads:
        yield PromptTokenizer(threads)


async def test_token_ids_are_taken_as_they_are(tokenizer: PromptTokenizer) -> None:
    assert await tokenizer.encode(TokensPrompt((7, 8)), served_model()) == [7, 8]


@pytest.mark.parametrize(
    ("prompt", "adds", "expected"),
    [
        (TextPrompt("hi"), None, (1, *tokens_of("hi"))),
        (TextPrompt("hi"), True, (1, *tokens_of("hi"))),
        (TextPrompt("hi"), False, tokens_of("hi")),
        (TextPrompt(""), None, (1,)),
        (CHAT, None, tokens_of("hi")),
        (CHAT, False, tokens_of("hi")),
        (CHAT, True, (1, *tokens_of("hi"))),
    ],
)
async def test_special_tokens_are_added_to_a_text_and_to_a_conversation_on_request(
    tokenizer: PromptTokenizer, prompt: TextPrompt | ChatPrompt, adds: bool | None, expected: tuple[int, ...]
) -> None:
    with_start = byte_tokenizer()
    with_start.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    model = served_model(text=TextModel(with_start, "{{ messages[0].content }}", {}))
    assert tuple(await tokenizer.encode(prompt, model, adds)) == expected


async def test_a_conversation_without_a_template_is_refused(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat: "):
        await tokenizer.encode(CHAT, served_model(text=TextModel(byte_tokenizer(), None, {})))


async def test_special_tokens_are_in_the_text_unless_they_are_skipped(tokenizer: PromptTokenizer) -> None:
    token_ids = [1, *tokens_of("hé")]
    assert await tokenizer.decode(token_ids, served_model(), False) == "<|start|>hé"
    assert await tokenizer.decode(token_ids, served_model(), True) == "hé"
