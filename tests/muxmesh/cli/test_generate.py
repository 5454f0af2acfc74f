import asyncio
import dataclasses
import io
import json
from typing import Any

import grpc
import pytest

from muxmesh.cli.main import main
from muxmesh.cli.streamed_output import _REASONS, _WAITS
from muxmesh.errors import InvalidRequest, WorkerLost
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.v1 import inference_pb2
from tests.support.fake_mesh import FakeMesh, output

SCHEDULING = inference_pb2.SchedulingInfo(
    policy="srtf", reason="srtf, priority 0: 2 s of work left", p50_output_tokens=40, p90_output_tokens=90,
    source="hint", prefill_s=0.5, decode_s=1.5, waited_s=0.25, decision=7, num_overtaken=3,
    waited_for=inference_pb2.Waits(slot_s=0.2, kv_s=0.0, order_s=0.05, worker_s=0.0, device_s=0.041),
    unit="unit-0", unit_reason="unit-0: 2 of 3 tokens cached, free, prefill 0.5 s",
)  # fmt: skip
JSON_OF_ABC = {
    "text": "abc", "token_ids": [97, 98, 99], "num_prompt_tokens": 3, "num_cached_tokens": 0, "num_output_tokens": 3,
    "finish_reason": "length", "stopped_by": None, "seed": 7, "queue_s": 0.25, "ttft_s": 0.5, "e2e_s": 1.5,
    "num_restarts": 2,
}  # fmt: skip


def generate(*arguments: str) -> int:
    return main(["generate", *arguments])


def test_the_output_goes_to_stdout_and_its_speed_to_stderr(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("hi") == 0
    printed = capsys.readouterr()
    assert printed.out == "abc\n"
    assert printed.err == ("[3 prompt tokens (0 cached), 3 output tokens, TTFT 500 ms, 2.0 tokens/s, finish: length]\n")


def test_one_token_has_no_decode_speed(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = output("a")
    assert generate("hi") == 0
    assert capsys.readouterr().err.endswith("1 output tokens, TTFT 500 ms, finish: length]\n")


def test_every_option_has_its_field_in_the_request(mesh: FakeMesh) -> None:
    options = (
        "--model m --max-new-tokens 5 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25 --presence-penalty 0.5 "
        "--frequency-penalty -0.5 --repetition-penalty 1.5 --logit-bias 3=-1 --logit-bias 4=2 --allowed-token-id 3 "
        "--allowed-token-id 4 --seed 9 --stop end --stop fin --cache-salt s --priority -3 --expected-output-tokens 8"
    )
    assert generate(*options.split(), "hi") == 0
    assert mesh.requests == [
        inference_pb2.GenerateRequest(
            model="m",
            text="hi",
            temperature=0.5,
            sampling=inference_pb2.SamplingOptions(num_sequences=1, top_k=4, top_p=0.75, min_p=0.25, seed=9),
            decoding=inference_pb2.DecodingOptions(
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                repetition_penalty=1.5,
                logit_bias={3: -1.0, 4: 2.0},
                allowed_token_ids=[3, 4],
            ),
            stopping=inference_pb2.StoppingOptions(max_new_tokens=5, stop_strings=["end", "fin"]),
            response=inference_pb2.ResponseOptions(output_token_ids=True),
            kv=inference_pb2.KvOptions(cache_salt="s"),
            priority=-3,
            expected_output_tokens=8,
        )
    ]


def test_the_default_is_greedy_sampling_of_plain_text(mesh: FakeMesh) -> None:
    assert generate("hi") == 0
    (request,) = mesh.requests
    assert request.HasField("temperature") and request.temperature == 0
    assert request.text == "hi" and not request.HasField("chat")
    assert not request.stopping.HasField("max_new_tokens") and not request.sampling.HasField("seed")
    assert mesh.deadlines_s == [None]


def test_the_temperature_can_be_left_to_the_model(mesh: FakeMesh) -> None:
    assert generate("--temperature", "model", "hi") == 0
    assert not mesh.requests[0].HasField("temperature")


def test_a_chat_prompt_is_one_turn_of_the_user(mesh: FakeMesh) -> None:
    assert generate("--chat", "hi") == 0
    (message,) = mesh.requests[0].chat.messages
    assert (message.role, message.content) == ("user", "hi")


def test_a_dash_reads_the_prompt_from_standard_input(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
    assert generate("-") == 0
    assert mesh.requests[0].text == "two\nlines\n"


def test_standard_input_that_is_no_text_is_refused(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x7fELF\xff")))
    assert generate("-") == 1
    assert capsys.readouterr().err.startswith("muxmesh: standard input: is not UTF-8 text: byte 0xff at offset 4")
    assert mesh.requests == []


def test_an_endless_standard_input_is_refused(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["generate", "-"], ["chat"]):
        with open("/dev/zero") as endless:
            monkeypatch.setattr("sys.stdin", endless)
            assert main(arguments) == 1
        assert "67108864 bytes, which no request holds" in capsys.readouterr().err
    assert mesh.requests == []


def test_json_has_the_output_and_its_figures(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--json", "hi") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == JSON_OF_ABC
    assert printed.err == ""


def test_json_of_several_outputs_is_a_list(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = output("abc", "xy", stop_string="end", finish_reason=2)
    assert generate("--json", "-n", "2", "hi") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {**JSON_OF_ABC, "finish_reason": "stop", "stopped_by": "end"}
    assert second == {**first, "text": "xy", "token_ids": [120, 121], "num_output_tokens": 2}
    assert mesh.requests[0].sampling.num_sequences == 2


def test_several_outputs_are_numbered(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = output("abc", "xy")
    assert generate("-n", "2", "hi") == 0
    assert capsys.readouterr().out == "[1] abc\n[2] xy\n"


def test_json_has_log_probabilities_on_request(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    (response,) = output("a")
    prompt = response.prompt_info
    prompt.token_ids.extend([3, 97])
    for target, logprobs in ((prompt, [0.0, -0.5]), (response.outputs, [-0.5])):
        target.logprobs.extend(logprobs)
        target.ranks.extend([1] * len(logprobs))
        target.token_texts.extend(["\ufffd"] * len(logprobs))
        target.token_bytes.extend([b"\xc3"] * len(logprobs))
        target.candidate_tokens.extend([inference_pb2.CandidateTokenInfo()] * len(logprobs))
    mesh.script = [response]
    assert generate("--json", "--logprobs", "1", "--prompt-logprobs", "0", "hi") == 0
    content = json.loads(capsys.readouterr().out)
    expected = {"token_id": 97, "logprob": -0.5, "rank": 1, "text": "\ufffd", "token_bytes": [0xC3]}
    assert content["logprobs"] == [{"chosen": expected, "top": [expected]}]
    assert content["prompt_logprobs"] == [{"chosen": expected, "top": []}]
    options = mesh.requests[0].response
    assert (options.output_logprobs, options.output_candidates.top_n) == (True, 1)
    assert options.prompt_logprobs and not options.HasField("prompt_candidates")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logprobs", "1"], "--logprobs: log-probabilities are printed with --json only"),
        (["--prompt-logprobs", "0"], "--prompt-logprobs: log-probabilities are printed with --json only"),
        (["--explain", "-n", "2"], "--explain: with several outputs, scheduling is printed with --json only"),
    ],
)
def test_options_that_need_json_are_refused_without_it(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert generate(*arguments, "hi") == 1
    assert capsys.readouterr().err == f"muxmesh: {message}\n"
    assert mesh.requests == []


def test_the_scheduling_of_a_request_is_printed_beside_the_output(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = output("abc")
    mesh.script[0].scheduling.CopyFrom(SCHEDULING)
    assert generate("--explain", "hi") == 0
    printed = capsys.readouterr()
    assert printed.out == "abc\n"
    assert printed.err.splitlines()[1:] == [
        "[expected output: 40 tokens, p90 90 (hint: the client's own estimate); work: 500 ms of prefill, 1.5 s of "
        "decode",
        "waited 250 ms for admission 7, which overtook 3 earlier requests; waited for: decode slot 200 ms, order 50 "
        "ms, device 41 ms",
        "srtf, priority 0: 2 s of work left",
        "chosen unit unit-0: 2 of 3 tokens cached, free, prefill 0.5 s]",
    ]
    assert mesh.requests[0].response.scheduling


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("fixed", "(fixed by the request); work: 500 ms of prefill, 30 min of decode"),
        (
            "cold",
            "(cold: no output has ended yet); work: 30 min of decode, the same for every such request of the model",
        ),
        ("new source", "(new source); work: 500 ms of prefill, 30 min of decode"),
    ],
)
def test_the_work_is_explained_by_the_source_of_the_length(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str], source: str, line: str
) -> None:
    mesh.script = output("abc")
    mesh.script[0].scheduling.CopyFrom(SCHEDULING)
    mesh.script[0].scheduling.MergeFrom(inference_pb2.SchedulingInfo(source=source, decode_s=1800.0))
    mesh.script[0].scheduling.waited_for.Clear()
    assert generate("--explain", "hi") == 0
    explanation = capsys.readouterr().err.splitlines()
    assert explanation[1] == f"[expected output: 40 tokens, p90 90 {line}"
    assert explanation[2].endswith("waited for: nothing")


def test_every_cause_of_a_wait_is_named() -> None:
    assert len(_WAITS) == len(inference_pb2.Waits.DESCRIPTOR.fields)


def test_json_has_the_scheduling_on_request(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = output("abc")
    mesh.script[0].scheduling.CopyFrom(SCHEDULING)
    assert generate("--explain", "--json", "hi") == 0
    scheduling = json.loads(capsys.readouterr().out)["scheduling"]
    waits = {"slot_s": 0.2, "kv_s": 0.0, "order_s": 0.05, "worker_s": 0.0, "device_s": 0.041}
    assert scheduling == {field.name: value for field, value in SCHEDULING.ListFields()} | {"waited_for": waits}


EXECUTION = Execution({PreemptionReason.ORDER: 2, PreemptionReason.KV_FULL: 1}, 4, 1, 2.5, 0.041, 0.0, 1.5, True)


def test_what_became_of_a_request_is_printed_after_its_scheduling(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = output("abc")
    mesh.script[-1].execution.CopyFrom(inference_pb2.ExecutionInfo(**dataclasses.asdict(EXECUTION)))
    assert generate("--explain", "hi") == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "[pre-empted: 2 by one that precedes it, 1 as it lacked memory itself; length predicted again: 4 times",
        "in the batch 2.5 s, paused 41 ms, computed again 1.5 s, overdue]",
    ]


def test_a_request_that_was_never_pre_empted_is_explained_too(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = output("abc")
    mesh.script[-1].execution.SetInParent()
    assert generate("--explain", "hi") == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "[pre-empted: never; length predicted again: 0 times", "decoded at once]"
    ]  # fmt: skip


def test_every_reason_of_a_pre_emption_is_named() -> None:
    assert set(_REASONS) == set(PreemptionReason)


def test_json_has_what_became_of_the_request_on_request(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = output("abc")
    mesh.script[-1].execution.CopyFrom(inference_pb2.ExecutionInfo(**dataclasses.asdict(EXECUTION)))
    assert generate("--explain", "--json", "hi") == 0
    found = json.loads(capsys.readouterr().out)["execution"]
    assert found == dataclasses.asdict(EXECUTION)


@pytest.mark.parametrize("lost", [grpc.StatusCode.UNAVAILABLE, WorkerLost("decode/m died")])
def test_a_router_that_is_lost_after_the_first_delta_is_reported_on_a_line_of_its_own(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str], lost: Any
) -> None:
    mesh.script = [*output("abc")[:2], lost]
    assert generate("hi") == 1
    printed = capsys.readouterr()
    assert printed.out == "ab\n"
    assert printed.err.startswith("muxmesh: the router was lost while it streamed the output: ")
    assert printed.err.endswith("; send the request again\n")


def test_a_router_that_is_lost_before_the_first_delta_is_an_unreachable_mesh(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = [grpc.StatusCode.UNAVAILABLE]
    assert generate("hi") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"muxmesh: no mesh answers at {mesh.address} (")


def test_a_passed_deadline_is_an_error(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = [asyncio.Event()]
    assert generate("--timeout", "0.1", "--json", "hi") == 1
    assert json.loads(capsys.readouterr().out)["error"] == "DeadlineExceeded"


def test_a_refused_field_is_named_in_text_and_json(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.script = [InvalidRequest("sampling.top_p", "is 0.0; more than 0 and at most 1")]
    assert generate("--top-p", "0", "hi") == 1
    assert capsys.readouterr().err == "muxmesh: --top-p: is 0.0; more than 0 and at most 1\n"
    assert generate("--top-p", "0", "--json", "hi") == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": "InvalidRequest",
        "field": "sampling.top_p",
        "message": "sampling.top_p: is 0.0; more than 0 and at most 1",
    }


@pytest.mark.parametrize("option", [["--max-new-tokens", "-1"], ["--seed", "-1"], ["--top-k", "99999999999"]])
def test_a_number_that_cannot_be_sent_is_an_error(
    mesh: FakeMesh, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", "m", *option, "hi") == 1
    assert f"muxmesh: {option[0]}: is {option[1]}; a whole number" in capsys.readouterr().err
    assert mesh.requests == []
