from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tokenizers.processors import TemplateProcessing

from muxmesh.errors import InvalidRequest, Overloaded
from muxmesh.models.chat_template import ChatTemplate, TemplateBudget
from muxmesh.models.tokenizer import TextModel, byte_tokenizer
from router.generation import ChatMessage, ChatPrompt, TextPrompt, TokensPrompt
from router.prompt_tokenizer import PromptTokenizer
from tests.support.pipeline_parts import served_model, tokens_of

CHAT = ChatPrompt((ChatMessage("user", "hi"),))
MAX_WAITING_BYTES = 100_000
LONG = "1" * 50_000


@pytest.fixture
def tokenizer() -> Iterator[PromptTokenizer]:
    with ThreadPoolExecutor(1) as short, ThreadPoolExecutor(2) as long:
        yield PromptTokenizer(short, long, MAX_WAITING_BYTES)


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
    model = served_model(text=TextModel(with_start, ChatTemplate("{{ messages[0].content }}", {})))
    assert tuple(await tokenizer.encode(prompt, model, adds)) == expected


async def test_a_conversation_without_a_template_is_refused(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat: "):
        await tokenizer.encode(CHAT, served_model(text=TextModel(byte_tokenizer())))


async def test_special_tokens_are_in_the_text_unless_they_are_skipped(tokenizer: PromptTokenizer) -> None:
    token_ids = [1, *tokens_of("hé")]
    assert await tokenizer.decode(token_ids, served_model(), False) == "<|start|>hé"
    assert await tokenizer.decode(token_ids, served_model(), True) == "hé"


class BlockedText(TextModel):
    """The byte tokenizer, which tokenizes a long text only while ``may_encode`` is set."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer(), ChatTemplate("{{ messages[0].content }}", {}))
        self.may_encode = threading.Event()
        self.encodes = threading.Event()
        self.num_encoded = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > 16_384:
            self.num_encoded += 1
            self.encodes.set()
            assert self.may_encode.wait(20)
        return super().encode(text, add_special_tokens)


async def test_a_short_prompt_does_not_wait_for_long_ones(tokenizer: PromptTokenizer) -> None:
    text = BlockedText()
    model = served_model(text=text)
    long = [asyncio.create_task(tokenizer.encode(TextPrompt(LONG), model)) for _ in range(2)]
    assert await asyncio.to_thread(text.encodes.wait, 20)
    assert await tokenizer.encode(TextPrompt("hi"), model) == list(tokens_of("hi"))
    assert await tokenizer.decode(tokens_of("hi"), model, True) == "hi"
    assert text.num_encoded == 1
    text.may_encode.set()
    assert [len(tokens) for tokens in await asyncio.gather(*long)] == [50_000, 50_000]


@pytest.mark.parametrize(
    "hostile",
    [ChatPrompt((ChatMessage("user", "x" * 20_000),)), ChatPrompt((ChatMessage("user", "x"),) * 300)],
    ids=["long text", "many turns"],
)
async def test_a_short_conversation_does_not_wait_for_long_ones(
    tokenizer: PromptTokenizer, hostile: ChatPrompt
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages|length > 99 or messages[0].content|length > 99 %}}{endless}{{% endif %}}ok"
    text = TextModel(byte_tokenizer(), ChatTemplate(template, {}, budget=TemplateBudget(cpu_s=0.2)))
    model = served_model(text=text)
    assert await tokenizer.encode(CHAT, model) == list(tokens_of("ok"))
    long = [asyncio.create_task(tokenizer.encode(hostile, model)) for _ in range(4)]
    await asyncio.sleep(0)
    assert await tokenizer.encode(CHAT, model) == list(tokens_of("ok"))
    assert sum(task.done() for task in long) <= 2
    for result in await asyncio.gather(*long, return_exceptions=True):
        assert isinstance(result, InvalidRequest) and "took more than 0.2 s of CPU time" in str(result)


async def test_a_conversation_that_is_cancelled_while_it_waits_is_not_rendered(tokenizer: PromptTokenizer) -> None:
    rendered = []

    class CountedText(BlockedText):
        def submit_chat(self, messages: Sequence[Mapping[str, str]]) -> Future[str]:
            rendered.append(len(messages))
            return super().submit_chat(messages)

    model = served_model(text=CountedText())
    long = ChatPrompt((ChatMessage("user", ""),) * 300)
    tasks = [asyncio.create_task(tokenizer.encode(long, model)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks)
    assert rendered == [300]


async def test_a_long_prompt_that_is_cancelled_while_it_waits_is_not_tokenized(tokenizer: PromptTokenizer) -> None:
    text = BlockedText()
    model = served_model(text=text)
    first = asyncio.create_task(tokenizer.encode(TextPrompt(LONG), model))
    assert await asyncio.to_thread(text.encodes.wait, 20)
    second = asyncio.create_task(tokenizer.encode(TextPrompt(LONG), model))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await second
    text.may_encode.set()
    await first
    await tokenizer.encode(TextPrompt(LONG), model)
    assert text.num_encoded == 2


async def test_text_above_the_limit_does_not_wait(tokenizer: PromptTokenizer) -> None:
    text = BlockedText()
    model = served_model(text=text)
    tasks = [asyncio.create_task(tokenizer.encode(TextPrompt(LONG), model)) for _ in range(2)]
    assert await asyncio.to_thread(text.encodes.wait, 20)
    with pytest.raises(Overloaded, match=r"100000 bytes of long prompts wait .* 50000 would be added; at most 100000"):
        await tokenizer.encode(TextPrompt(LONG), model)
    text.may_encode.set()
    await asyncio.gather(*tasks)
    assert len(await tokenizer.encode(TextPrompt(LONG), model)) == 50_000


async def test_one_prompt_may_be_longer_than_all_that_may_wait(tokenizer: PromptTokenizer) -> None:
    assert len(await tokenizer.encode(TextPrompt("x" * 150_000), served_model())) == 150_000


@pytest.mark.parametrize(
    ("prompt", "field"),
    [(TextPrompt(LONG), "text"), (ChatPrompt((ChatMessage("user", LONG),)), "chat.messages")],
    ids=["text", "chat"],
)
async def test_a_prompt_that_is_certainly_too_long_is_refused_untokenized(
    tokenizer: PromptTokenizer, prompt: TextPrompt | ChatPrompt, field: str
) -> None:
    text = BlockedText()
    with pytest.raises(InvalidRequest, match="is more than 1000 tokens, the most that fit") as caught:
        await tokenizer.encode(prompt, served_model(text=text), max_tokens=1000)
    assert caught.value.field == field
    assert text.num_encoded == 0
