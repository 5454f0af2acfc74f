"""What a mesh returns for a prompt, as plain frozen values, and how they are read from the wire messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from muxmesh.errors import InternalError
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.quoting import quoted
from muxmesh.types import NO_WAITS, Waits
from muxmesh.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at one position, its log-probability and its rank; 1 is the most likely.

    ``token_bytes`` may be a part of a character; such bytes are U+FFFD in ``text``.
    """

    token_id: int
    logprob: float
    rank: int
    text: str = ""
    token_bytes: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, and of the requested number of most likely ones.

    They are those of the model, before penalties, bias, temperature and filters.
    """

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an output sequence.

    ``stopped_by`` is the token id or the stop string that ended it, and None if ``reason`` is not stop.
    """

    reason: Literal["length", "stop", "aborted"]
    num_output_tokens: int
    stopped_by: int | str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured at the router, in seconds from arrival.

    ``num_restarts`` counts further attempts after a worker was lost or the KV pool was full. ``router_s`` is the part
    of ``ttft_s`` that the router itself took. ``met_slo``: whether the request met the SLO of its model; None: it has
    none, or its unloaded latency is not known yet.
    """

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_restarts: int
    router_s: float = 0.0
    met_slo: bool | None = None


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Why a request was served when it was. Times are in seconds; see SchedulingInfo in the proto.

    ``source`` names the origin of the expected length. ``decision`` numbers the unit's admissions from 1.
    ``num_overtaken`` requests of the same model and priority had arrived earlier and still waited. ``waited_for``:
    what the request waited for until its first token. ``unit`` served its first attempt, and ``unit_reason`` says for
    people why it was chosen.
    """

    policy: str
    reason: str
    p50_output_tokens: float
    p90_output_tokens: float
    source: str
    prefill_s: float
    decode_s: float
    waited_s: float
    decision: int
    num_overtaken: int
    waited_for: Waits = NO_WAITS
    unit: str = ""
    unit_reason: str = ""


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What the mesh reports about a prompt.

    ``seed`` reproduces the output. ``num_cached_tokens`` of the prompt were found in the prefix cache. ``logprobs``
    belong to the second token and those after it. ``logprobs`` and ``scheduling`` are filled only on request.
    ``predicted_output_tokens`` is None if the mesh made no prediction.
    """

    num_tokens: int
    num_cached_tokens: int
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    predicted_output_tokens: int | None = None
    scheduling: Scheduling | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of the output sequence ``index``. ``logprobs`` has one entry per token if requested.

    ``prompt`` is set in the first delta of the stream, ``finish`` in the last delta of each sequence, ``timings`` in
    the last delta of the stream, and ``execution`` too, if it is requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    num_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: PromptFacts | None = None
    finish: Finish | None = None
    timings: Timings | None = None
    execution: Execution | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete output sequence.

    ``execution`` is filled only on request: the pre-emptions of the request and their time, of all its sequences.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt: PromptFacts
    finish: Finish
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] = ()
    execution: Execution | None = None


def completions_of(deltas: Sequence[Delta]) -> tuple[Completion, ...]:
    """Joins all deltas of a stream to its outputs, in order of their index."""
    facts, timings = (deltas[0].prompt, deltas[-1].timings) if deltas else (None, None)
    if facts is None or timings is None:
        raise InternalError("the mesh ended the stream without a finish")
    sequences: dict[int, list[Delta]] = {}
    for delta in deltas:
        sequences.setdefault(delta.index, []).append(delta)
    execution = deltas[-1].execution
    return tuple(_completion(sequences[index], facts, timings, execution) for index in sorted(sequences))


def _completion(
    deltas: Sequence[Delta], prompt: PromptFacts, timings: Timings, execution: Execution | None
) -> Completion:
    finish = deltas[-1].finish
    if finish is None:
        raise InternalError("the mesh ended the stream without a finish")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        prompt=prompt,
        finish=finish,
        timings=timings,
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        execution=execution,
    )


def delta_of(response: inference_pb2.GenerateResponse, num_candidates: int, num_prompt_candidates: int) -> Delta:
    """Reads one message of a stream. Raises InternalError for a finish that this client does not know.

    ``num_candidates``: how many were requested for each output token, and for each token of the prompt.
    """
    outputs, wire, prompt, timings = response.outputs, response.timings, None, None
    if response.HasField("prompt_info"):
        prompt = _prompt_facts(response, num_prompt_candidates)
    if response.HasField("timings"):
        met_slo = wire.met_slo if wire.HasField("met_slo") else None
        timings = Timings(wire.queue_s, wire.ttft_s, wire.e2e_s, wire.num_restarts, wire.router_s, met_slo)
    return Delta(
        index=outputs.index,
        text=outputs.text,
        token_ids=tuple(outputs.token_ids),
        num_tokens=outputs.num_tokens,
        logprobs=_logprobs(outputs, num_candidates),
        prompt=prompt,
        finish=_finish(outputs.finish_info) if outputs.HasField("finish_info") else None,
        timings=timings,
        execution=_execution(response.execution) if response.HasField("execution") else None,
    )


def _execution(wire: inference_pb2.ExecutionInfo) -> Execution:
    """Reasons that this client does not know are left out."""
    known = {reason: wire.preemptions[reason] for reason in PreemptionReason if reason in wire.preemptions}
    values = {one.name: getattr(wire, one.name) for one in fields(Execution)}
    return Execution(**values | {"preemptions": known})


def _prompt_facts(response: inference_pb2.GenerateResponse, num_candidates: int) -> PromptFacts:
    info, wire = response.prompt_info, response.scheduling
    scheduling = None
    if response.HasField("scheduling"):
        values = {field.name: getattr(wire, field.name) for field in fields(Scheduling)}
        waits = Waits(**{field.name: getattr(wire.waited_for, field.name) for field in fields(Waits)})
        scheduling = Scheduling(**values | {"waited_for": waits})
    return PromptFacts(
        num_tokens=info.num_prompt_tokens,
        num_cached_tokens=info.num_cached_tokens,
        seed=info.seed,
        logprobs=_logprobs(info, num_candidates)[1:],  # the first token has none
        predicted_output_tokens=info.predicted_output_tokens if info.HasField("predicted_output_tokens") else None,
        scheduling=scheduling,
    )


def _logprobs(
    columns: inference_pb2.SequenceOutput | inference_pb2.PromptInfo, num_candidates: int
) -> tuple[TokenLogprobs, ...]:
    """One entry for each token. The wire leaves the token itself out of its candidates."""
    if not columns.logprobs:
        return ()
    chosen = (columns.token_ids, columns.logprobs, columns.ranks, columns.token_texts, columns.token_bytes)
    return tuple(
        _token_logprobs(Candidate(*one), candidates, num_candidates)
        for *one, candidates in zip(*chosen, columns.candidate_tokens, strict=True)
    )


def _token_logprobs(chosen: Candidate, others: inference_pb2.CandidateTokenInfo, num_candidates: int) -> TokenLogprobs:
    top = [Candidate(one.id, one.logprob, one.rank, one.text, one.token_bytes) for one in others.tokens]
    if len(top) < num_candidates:  # the token is one of the candidates: its rank is the one that is missing
        index = next((index for index, one in enumerate(top) if one.rank != index + 1), len(top))
        top.insert(index, replace(chosen, rank=index + 1))
    return TokenLogprobs(chosen, tuple(top))


def _finish(wire: inference_pb2.FinishInfo) -> Finish:
    kind = wire.WhichOneof("stop_reason")
    stopped_by = getattr(wire, kind) if kind else None
    reasons: dict[int, Literal["length", "stop", "aborted"]] = {1: "length", 2: "stop", 3: "aborted"}
    if wire.finish_reason not in reasons:
        raise InternalError(f"the mesh reports the unknown finish_reason {quoted(wire.finish_reason)}")
    return Finish(reasons[wire.finish_reason], wire.num_output_tokens, stopped_by)
