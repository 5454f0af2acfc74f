"""From the mesh's own values to the messages of the public API. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.engine.api import Finished
from muxmesh.order import Order
from muxmesh.types import Candidate, EngineRequest, Finish, FinishReason, TokenLogprobs
from muxmesh.v1 import inference_pb2
from router.answer import Answer, Delta
from router.attempt import Prefilled
from router.credits import Credit
from router.forecast import Forecast
from router.stop_strings import StopStrings
from router.validation import CheckedRequest


def open_answer(checked: CheckedRequest, request: EngineRequest) -> Answer:
    """Where the tokens of one answer become text."""
    response, stopping = checked.wire.response, checked.wire.stopping
    skip_special = response.skip_special_tokens if response.HasField("skip_special_tokens") else True
    needs_text = checked.wants_text or stopping.stop_strings
    return Answer(
        request.stopping,
        checked.model.text.detokenizer(skip_special, request.prompt_token_ids) if needs_text else None,
        StopStrings(stopping.stop_strings, stopping.include_stop_strings),
        stopping.include_stop_strings,
    )


def prompt_info_of(
    checked: CheckedRequest, request: EngineRequest, forecast: Forecast, prefilled: Prefilled | None
) -> inference_pb2.PromptInfo:
    """What the first message of a response tells of the prompt."""
    wanted = checked.wire.response.prompt_token_ids
    prefilled = prefilled or Prefilled(0)
    prediction = request.prediction if forecast.judged else None
    return inference_pb2.PromptInfo(
        predicted_output_tokens=max(1, round(prediction.p50_tokens)) if prediction else None,
        num_prompt_tokens=len(request.prompt_token_ids),
        token_ids=request.prompt_token_ids if wanted else (),
        seed=request.sampling.seed,
        num_cached_tokens=prefilled.num_cached_tokens,
        token_logprobs=[logprobs_of(place) for place in prefilled.logprobs],
    )


def scheduling_of(
    request: EngineRequest, forecast: Forecast, order: Order, credit: Credit | None, waited_s: float
) -> inference_pb2.SchedulingInfo:
    """Why a request was served when it was."""
    standing = (credit and credit.standing) or request.standing
    prediction = request.prediction or forecast.prediction
    return inference_pb2.SchedulingInfo(
        policy=order.policy,
        reason=order.reason(standing, standing.arrived_at_s + waited_s),
        p50_output_tokens=prediction.p50_tokens,
        p90_output_tokens=prediction.p90_tokens,
        source=forecast.source,
        prefill_s=standing.prefill_s,
        decode_s=standing.decode_s,
        waited_s=waited_s,
        decision=credit.decision if credit else 0,
        num_overtaken=credit.num_overtaken if credit else 0,
    )


def response_of(
    checked: CheckedRequest, request: EngineRequest, delta: Delta, logprobs: Sequence[TokenLogprobs] = ()
) -> inference_pb2.GenerateResponse:
    """A message with what is new of one answer, as far as the client wants it."""
    response = inference_pb2.GenerateResponse()
    output = response.outputs
    output.index, output.num_tokens = request.sequence, len(delta.token_ids)
    if checked.wants_text:
        output.text = delta.text
    if checked.wants_token_ids:
        output.token_ids.extend(delta.token_ids)
    if logprobs:
        output.token_logprobs.extend(logprobs_of(place) for place in logprobs[: len(delta.token_ids)])
    return response


def logprobs_of(place: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    """Log-probabilities at one place."""

    def entry(candidate: Candidate) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(token_id=candidate.token_id, logprob=candidate.logprob, rank=candidate.rank)

    return inference_pb2.TokenLogprobs(chosen=entry(place.chosen), top=[entry(candidate) for candidate in place.top])


def stopped_by_string(answer: Answer, stop: str) -> inference_pb2.FinishInfo:
    """The end of an answer by a stop string."""
    return inference_pb2.FinishInfo(
        num_output_tokens=len(answer.token_ids), finish_reason=inference_pb2.FinishInfo.STOP, stop_string=stop
    )


def finish_info_of(answer: Answer, event: Finished, delta: Delta) -> inference_pb2.FinishInfo:
    """The end of an answer; ``delta`` is what was held back until then, and may hold a stop string."""
    if delta.stopped_by is not None:
        return stopped_by_string(answer, delta.stopped_by)
    finish: Finish = event.finish
    info = inference_pb2.FinishInfo(num_output_tokens=len(answer.token_ids))
    if finish.reason is FinishReason.LENGTH:
        info.finish_reason = inference_pb2.FinishInfo.LENGTH
    else:
        info.finish_reason = inference_pb2.FinishInfo.STOP
        assert finish.token_id is not None
        if finish.reason is FinishReason.EOS:
            info.eos_token_id = finish.token_id
        else:
            info.stop_token_id = finish.token_id
    return info
