"""grpclib: pure Python over h2, with messages of Google's protobuf."""

from __future__ import annotations

import asyncio
import sys

from checks import fails, reaches_its_deadline, run_all, until
from grpclib.client import Channel
from grpclib.const import Status
from muxmesh.v1 import inference_grpc, inference_pb2, mesh_grpc, mesh_pb2

STOPPING = inference_pb2.StoppingOptions(max_new_tokens=8, ignore_eos=True)
LONG = inference_pb2.GenerateRequest(
    model="slow", text="a", stopping=inference_pb2.StoppingOptions(max_new_tokens=2000, ignore_eos=True)
)
LARGEST_SEED = (1 << 63) - 1


class Client:
    def __init__(self, channel: Channel) -> None:
        self.inference = inference_grpc.InferenceStub(channel)
        self.mesh = mesh_grpc.MeshStub(channel)

    async def list_models(self) -> None:
        models = (await self.mesh.ListModels(mesh_pb2.ListModelsRequest())).models
        assert sorted(model.name for model in models) == ["sim", "slow", "tiny"]
        assert all(model.vocab_size == 259 for model in models)

    async def generate(self) -> None:
        request = inference_pb2.GenerateRequest(model="sim", text="Hello", stopping=STOPPING)
        response = await self.inference.Generate(request)
        assert response.outputs.num_tokens == 8 and response.prompt_info.num_prompt_tokens == 5
        assert response.outputs.finish_info.finish_reason == inference_pb2.FinishInfo.LENGTH

    async def stream(self) -> None:
        request = inference_pb2.GenerateRequest(model="sim", text="Hello", stopping=STOPPING)
        request.sampling.seed, request.response.output_token_ids = 7, True
        text, token_ids = "", []
        async with self.inference.GenerateStream.open() as call:
            await call.send_message(request, end=True)
            async for response in call:
                text += response.outputs.text
                token_ids += response.outputs.token_ids
        whole = (await self.inference.Generate(request)).outputs
        assert (text, token_ids) == (whole.text, list(whole.token_ids)) and len(token_ids) == 8

    async def chat(self) -> None:
        request = inference_pb2.GenerateRequest(model="tiny", stopping=STOPPING)
        request.chat.messages.add(role="system", content="Be brief.")
        request.chat.messages.add(role="user", content="Héllo")
        assert (await self.inference.Generate(request)).outputs.num_tokens == 8

    async def seed(self) -> None:
        request = inference_pb2.GenerateRequest(model="tiny", text="a", temperature=1, stopping=STOPPING)
        drawn = await self.inference.Generate(request)
        assert 0 <= drawn.prompt_info.seed < 1 << 53
        request.sampling.seed = drawn.prompt_info.seed
        assert (await self.inference.Generate(request)).outputs.text == drawn.outputs.text
        request.sampling.seed = LARGEST_SEED
        assert (await self.inference.Generate(request)).prompt_info.seed == LARGEST_SEED

    async def log_probabilities(self) -> None:
        request = inference_pb2.GenerateRequest(model="tiny", text="abc", temperature=0, stopping=STOPPING)
        options = request.response
        options.output_token_ids = options.prompt_token_ids = options.output_logprobs = options.prompt_logprobs = True
        options.output_candidates.top_n = 2
        response = await self.inference.Generate(request)
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
        request = inference_pb2.TokenizeRequest(model="sim", text="héllo", token_texts=True)
        tokenized = await self.inference.Tokenize(request)
        assert tokenized.num_tokens == 6 and b"".join(tokenized.token_bytes).decode() == "héllo"
        back = inference_pb2.DetokenizeRequest(model="sim", token_ids=tokenized.token_ids)
        assert (await self.inference.Detokenize(back)).text == "héllo"

    async def refusal(self) -> None:
        request = inference_pb2.GenerateRequest(model="sim", text="a")
        request.sampling.top_p = 0
        with fails(Status.INVALID_ARGUMENT, "sampling.top_p"):
            await self.inference.Generate(request)

    async def cancel(self) -> None:
        async with self.inference.GenerateStream.open() as call:
            await call.send_message(LONG, end=True)
            await call.recv_message()
            await call.cancel()
        await until(self.is_idle)

    async def deadline(self) -> None:
        with reaches_its_deadline():
            async with self.inference.GenerateStream.open(timeout=0.3) as call:
                await call.send_message(LONG, end=True)
                async for _ in call:
                    pass
        await until(self.is_idle)

    async def is_idle(self) -> bool:
        models = (await self.mesh.GetStatus(mesh_pb2.GetStatusRequest())).models
        return all(model.num_requests_running == 0 for model in models)


if __name__ == "__main__":
    sys.exit(asyncio.run(run_all(Client)))
