"""betterproto: messages are dataclasses, and stubs run over grpclib."""

from __future__ import annotations

import asyncio
import sys

import betterproto
from checks import fails, reaches_its_deadline, run_all, until
from grpclib.client import Channel
from grpclib.const import Status
from muxmesh.v1 import (
    CandidateTokens,
    ChatMessage,
    ChatPrompt,
    DetokenizeRequest,
    FinishInfoFinishReason,
    GenerateRequest,
    GetStatusRequest,
    InferenceStub,
    ListModelsRequest,
    MeshStub,
    ResponseOptions,
    SamplingOptions,
    StoppingOptions,
    TokenizeRequest,
)

STOPPING = StoppingOptions(max_new_tokens=8, ignore_eos=True)
LONG = GenerateRequest(model="slow", text="a", stopping=StoppingOptions(max_new_tokens=2000, ignore_eos=True))
LARGEST_SEED = (1 << 63) - 1


class Client:
    def __init__(self, channel: Channel) -> None:
        self.inference = InferenceStub(channel)
        self.mesh = MeshStub(channel)

    async def list_models(self) -> None:
        models = (await self.mesh.list_models(ListModelsRequest())).models
        assert sorted(model.name for model in models) == ["sim", "slow", "tiny"]
        assert all(model.vocab_size == 259 for model in models)

    async def generate(self) -> None:
        response = await self.inference.generate(GenerateRequest(model="sim", text="Hello", stopping=STOPPING))
        assert response.outputs.num_tokens == 8 and response.prompt_info.num_prompt_tokens == 5
        assert response.outputs.finish_info.finish_reason == FinishInfoFinishReason.LENGTH

    async def stream(self) -> None:
        request = GenerateRequest(
            model="sim",
            text="Hello",
            stopping=STOPPING,
            sampling=SamplingOptions(seed=7),
            response=ResponseOptions(output_token_ids=True),
        )
        text, token_ids = "", []
        async for response in self.inference.generate_stream(request):
            text += response.outputs.text
            token_ids += response.outputs.token_ids
        whole = (await self.inference.generate(request)).outputs
        assert (text, token_ids) == (whole.text, whole.token_ids) and len(token_ids) == 8

    async def chat(self) -> None:
        turns = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Héllo")]
        request = GenerateRequest(model="tiny", chat=ChatPrompt(messages=turns), stopping=STOPPING)
        assert (await self.inference.generate(request)).outputs.num_tokens == 8

    async def seed(self) -> None:
        request = GenerateRequest(model="tiny", text="a", temperature=1.0, stopping=STOPPING)
        drawn = await self.inference.generate(request)
        assert 0 <= drawn.prompt_info.seed < 1 << 53
        request.sampling = SamplingOptions(seed=drawn.prompt_info.seed)
        assert (await self.inference.generate(request)).outputs.text == drawn.outputs.text
        request.sampling = SamplingOptions(seed=LARGEST_SEED)
        assert (await self.inference.generate(request)).prompt_info.seed == LARGEST_SEED

    async def log_probabilities(self) -> None:
        options = ResponseOptions(
            output_token_ids=True,
            prompt_token_ids=True,
            output_logprobs=True,
            output_candidates=CandidateTokens(top_n=2),
            prompt_logprobs=True,
        )
        response = await self.inference.generate(
            GenerateRequest(model="tiny", text="abc", temperature=0.0, stopping=STOPPING, response=options)
        )
        for columns in (response.outputs, response.prompt_info):
            lengths = {
                len(column)
                for column in (columns.logprobs, columns.ranks, columns.candidate_tokens, columns.token_texts,
                               columns.token_bytes, columns.token_ids)
            }  # fmt: skip
            assert len(lengths) == 1
        assert all(logprob <= 0 for logprob in response.outputs.logprobs) and set(response.outputs.ranks) == {1}
        assert [[one.rank for one in others.tokens] for others in response.outputs.candidate_tokens] == [[2]] * 8
        assert "".join(response.prompt_info.token_texts) == "abc"

    async def tokenize(self) -> None:
        tokenized = await self.inference.tokenize(TokenizeRequest(model="sim", text="héllo", token_texts=True))
        assert tokenized.num_tokens == 6 and b"".join(tokenized.token_bytes).decode() == "héllo"
        back = await self.inference.detokenize(DetokenizeRequest(model="sim", token_ids=tokenized.token_ids))
        assert back.text == "héllo"

    async def refusal(self) -> None:
        with fails(Status.INVALID_ARGUMENT, "sampling.top_p"):
            await self.inference.generate(GenerateRequest(model="sim", text="a", sampling=SamplingOptions(top_p=0.0)))

    async def cancel(self) -> None:
        responses = self.inference.generate_stream(LONG)
        await anext(responses)
        await responses.aclose()
        await until(self.is_idle)

    async def deadline(self) -> None:
        with reaches_its_deadline():
            async for _ in self.inference.generate_stream(LONG, timeout=0.3):
                pass
        await until(self.is_idle)

    async def is_idle(self) -> bool:
        return all(model.num_requests_running == 0 for model in (await self.mesh.get_status(GetStatusRequest())).models)


if __name__ == "__main__":
    assert betterproto.__version__
    sys.exit(asyncio.run(run_all(Client)))
