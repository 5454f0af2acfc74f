import asyncio
from dataclasses import replace

from muxmesh.metrics.family import Family, Labels
from router.generation import GenerationRequest, TextPrompt
from router.request_record import RequestRecord
from router.router_metrics import router_families
from tests.support.pipeline_parts import PipelineParts, pipeline_parts, served_model, until, writes

REQUEST = GenerationRequest(model="m", prompt=TextPrompt("hello"), request_id="r", num_sequences=2)


def families(parts: PipelineParts) -> dict[str, Family]:
    found = router_families(parts.models, parts.pipeline, parts.forecaster, parts.units, parts.clock.unix_s())
    return {family.name: family for family in found}


async def run(parts: PipelineParts, request: GenerationRequest) -> None:
    async for _ in await parts.pipeline.start(request, RequestRecord("r", 100.0)):
        pass


async def test_sequences_wait_then_run_then_are_gone() -> None:
    async with pipeline_parts(writes("abc"), served_model("m"), served_model("n")) as parts:
        parts.admission.open.clear()
        running = asyncio.create_task(run(parts, REQUEST))
        await until(lambda: parts.admission.num_queued("m") == 1)
        parts.clock.advance(3.0)
        waiting = families(parts)
        assert waiting["vllm:num_requests_waiting"].samples == {("m",): 2, ("n",): 0}
        assert waiting["muxmesh_requests_waiting"].samples == waiting["vllm:num_requests_waiting"].samples
        assert waiting["muxmesh_oldest_waiting_seconds"].samples["m",] == 3
        assert waiting["vllm:num_requests_running"].samples == {("m",): 0, ("n",): 0}
        parts.admission.open.set()
        await running
        idle = families(parts)
    nothing: dict[Labels, float] = {("m",): 0, ("n",): 0}
    assert idle["vllm:num_requests_waiting"].samples == idle["vllm:num_requests_running"].samples == nothing
    assert idle["muxmesh_oldest_waiting_seconds"].samples == nothing
    assert idle["vllm:prompt_tokens_total"].samples == {("m",): 5, ("n",): 0}
    assert idle["vllm:generation_tokens_total"].samples == {("m",): 6, ("n",): 0}
    assert idle["muxmesh_unit_connected"].samples == {("u",): 1}
    assert idle["muxmesh_residency_blocks"].samples == {("u",): 0}
    assert idle["muxmesh_unit_choices_total"].samples == {("u", "only"): 2}, "one for each sequence"
    assert idle["muxmesh_unit_choice_cached_tokens_total"].samples == {("u", "only"): 0}


async def test_the_predictor_is_measured() -> None:
    async with pipeline_parts(writes("abc")) as parts:
        await run(parts, replace(REQUEST, num_sequences=1))
        measured = families(parts)
    assert measured["muxmesh_predictor_tau"].samples == {}, "too few outputs"
    assert measured["muxmesh_predictions_used"].samples == {("m",): 1}
    assert measured["muxmesh_predictions_late_total"].samples == {(): 0}
    assert measured["muxmesh_predictor_failures_total"].samples == {(): 0}
