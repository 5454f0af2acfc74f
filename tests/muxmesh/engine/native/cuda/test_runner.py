"""Whole steps on the device, in Triton's interpreter, against the CPU engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.device.torch_device import Event, InterpretedDevice, open_torch_device
from muxmesh.engine.native.cuda.runner import CudaRunner
from muxmesh.engine.step import Chunk, PromptScoring, Runner, SampledToken, SampleSpec, Step, StepOutcome
from muxmesh.errors import DeviceError, DeviceLost, SequenceFailed
from muxmesh.models.model_spec import read_model_spec
from muxmesh.types import Sampling, TokenLogprobs
from tests.support.device_model import device_runner, image_weights, nan_pool, tiny_geometry
from tests.support.refusing_device import RefusingDevice
from tests.support.tiny import SHAPES, tiny_runner, write_tiny_model
from tests.support.triton_interpreter import INTERPRETED, multiply_bf16_exactly

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="a GPU does not fault on demand")

TABLES = {1: (9, 2, 11), 2: (4, 31, 0), 3: (1, 7, 8)}
TOKENS = {job: tuple(np.random.default_rng(job).integers(3, 259, 24).tolist()) for job in TABLES}
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _exact_products() -> None:
    multiply_bf16_exactly()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "gqa", SHAPES["gqa"])


@pytest.fixture(scope="module")
def runner(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CudaRunner:
    return device_runner(folder, tmp_path_factory.mktemp("cache"), open_torch_device())


@pytest.fixture(scope="module")
def cpu(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return tiny_runner(folder, tmp_path_factory.mktemp("cache"))[0]


def always() -> bool:
    return True


def prompt(job: int, start: int, end: int, sampling: Sampling | None = GREEDY, **more: Any) -> Chunk:
    sample = None if sampling is None else SampleSpec(sampling, 0)
    return Chunk(job, start, TOKENS[job][start:end], TABLES[job], **{"sample": sample} | more)


def decode(job: int, position: int, token: int, sampling: Sampling = GREEDY, **more: Any) -> Chunk:
    spec = SampleSpec(sampling, max(0, position - 8), **more)
    return Chunk(job, position, (token,), TABLES[job], spec)


def run(runner: Runner, *chunks: Chunk, num_steps: int = 1) -> StepOutcome:
    return runner.run(Step(chunks, num_steps), always)


def tokens(outcome: StepOutcome) -> dict[int, list[int]]:
    return {job: [token.token_id for token in sampled] for job, sampled in outcome.sampled.items()}


def generation(runner: Runner) -> dict[int, list[int]]:
    """Greedy tokens of three sequences: chunked prefill, steps of prompt chunks and decode rows, runs of decode."""
    got: dict[int, list[int]] = {1: [], 2: [], 3: []}

    def step(*chunks: Chunk, num_steps: int = 1) -> None:
        while num_steps:
            outcome = runner.run(Step(chunks, min(num_steps, runner.max_steps)), always)
            assert not outcome.failed
            for job, sampled in tokens(outcome).items():
                got[job] += sampled
            num_steps -= outcome.num_steps
            if num_steps:  # a runner that samples on the host computes one step at a time
                assert outcome.num_steps == 1
                chunks = tuple(chunk.following(got[chunk.job_id][-1]) for chunk in chunks)

    step(prompt(1, 0, 17), prompt(2, 0, 9, None))
    step(prompt(2, 9, 20), decode(1, 17, got[1][-1]), prompt(3, 0, 1))
    step(decode(1, 18, got[1][-1]), decode(2, 20, got[2][-1]), decode(3, 1, got[3][-1]), num_steps=3)
    return got


@pytest.mark.parametrize(
    "shape", ["gqa", "odd head size", "untied, wide heads", "mistral", "qwen2", "qwen3", "rope llama3"]
)
def test_greedy_tokens_are_those_of_the_cpu_engine(tmp_path: Path, shape: str) -> None:
    model = write_tiny_model(tmp_path / "model", SHAPES[shape])
    on_device = generation(device_runner(model, tmp_path, open_torch_device()))
    assert on_device == generation(tiny_runner(model, tmp_path)[0])
    assert [len(sampled) for sampled in on_device.values()] == [5, 4, 4]


def test_half_precision_keeps_the_tokens_of_the_reference_where_they_are_clear(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", SHAPES["qwen3"])
    exact = run(tiny_runner(model, tmp_path)[0], prompt(1, 0, 20, Sampling(0.0, logprobs=2))).sampled[1][0]
    assert exact.logprobs is not None
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
        half = device_runner(model, tmp_path, open_torch_device(), dtype)
        got = run(half, prompt(1, 0, 20, Sampling(0.0, logprobs=2))).sampled[1][0]
        assert got.logprobs is not None and got.token_id == exact.token_id
        assert abs(got.logprobs.chosen.logprob - exact.logprobs.chosen.logprob) < tolerance


SAMPLED = {
    "seeded": Sampling(0.9, seed=5),
    "top-k": Sampling(0.8, seed=6, top_k=5),
    "top-p": Sampling(1.3, seed=7, top_p=0.8),
    "min-p": Sampling(1.5, seed=8, min_p=0.1),
}


@pytest.mark.parametrize("sampling", SAMPLED.values(), ids=SAMPLED.keys())
def test_a_run_of_steps_samples_what_the_host_samples_step_by_step(
    runner: CudaRunner, cpu: Runner, sampling: Sampling
) -> None:
    chunk = prompt(1, 0, 9, sampling)
    (first,) = run(cpu, chunk).sampled[1]
    assert tokens(run(runner, chunk)) == {1: [first.token_id]}
    expected, chunk = [], decode(1, 9, first.token_id, sampling)
    for _ in range(4):
        expected += tokens(run(cpu, chunk))[1]
        chunk = chunk.following(expected[-1])
    assert tokens(run(runner, decode(1, 9, first.token_id, sampling), num_steps=4)) == {1: expected}


EDITED: dict[str, Callable[[], Chunk]] = {
    "bias": lambda: decode(1, 9, 7, Sampling(0.9, seed=3, logit_bias=((9, 4.0), (12, 3.5)))),
    "allowed": lambda: decode(1, 9, 7, Sampling(0.9, seed=3, allowed_token_ids=(4, 90, 200))),
    "banned": lambda: decode(1, 9, 7, banned=frozenset(range(3, 256))),
    "log-probabilities": lambda: decode(1, 9, 7, Sampling(0.9, seed=3, logprobs=3)),
}


@pytest.mark.parametrize("chunk", EDITED.values(), ids=EDITED.keys())
def test_runs_of_steps_with_edited_logits_or_log_probabilities_equal_the_host(
    runner: CudaRunner, cpu: Runner, chunk: Callable[[], Chunk]
) -> None:
    for one in (runner, cpu):
        run(one, prompt(1, 0, 9))
    expected, following = [], chunk()
    for _ in range(3):
        (token,) = run(cpu, following).sampled[1]
        expected.append(token)
        following = following.following(token.token_id)
    got = run(runner, chunk(), decode(2, 0, 5), num_steps=3)
    assert_same(got.sampled[1], expected)
    assert got.num_steps == 3 and len(got.sampled[2]) == 3


PENALTIES = {
    "frequency and presence, no output yet": (Sampling(0.9, seed=2, frequency_penalty=-3.0, presence_penalty=0.4), 0),
    "all, greedy, with log-probabilities": (
        Sampling(0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.7, logprobs=2),
        2,
    ),
}


@pytest.mark.parametrize(("sampling", "num_outputs"), PENALTIES.values(), ids=PENALTIES.keys())
def test_the_tokens_of_a_run_are_penalized_in_its_later_steps(
    runner: CudaRunner, cpu: Runner, sampling: Sampling, num_outputs: int
) -> None:
    known, outputs = TOKENS[1][: 10 - num_outputs], [7, 11][:num_outputs]

    def chunk(position: int, token: int, output: list[int]) -> Chunk:
        return decode(1, position, token, sampling, prompt_token_ids=known, output_token_ids=tuple(output))

    last = [*known, *outputs][-1]
    for one in (runner, cpu):
        run(one, prompt(1, 0, 9))
    expected: list[SampledToken] = []
    output, token = list(outputs), last
    for position in range(9, 13):
        expected += run(cpu, chunk(position, token, output)).sampled[1]
        token = expected[-1].token_id
        output.append(token)
    got = run(runner, decode(2, 0, 5), chunk(9, last, outputs), num_steps=4)
    assert_same(got.sampled[1], expected)
    alone = run(runner, decode(2, 0, 5), num_steps=4)
    assert got.sampled[2] == alone.sampled[2], "sequences without penalties have none"


def assert_same(got: tuple[SampledToken, ...], expected: list[SampledToken]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if ours.logprobs and theirs.logprobs:
            assert_near(ours.logprobs, theirs.logprobs)


def assert_near(got: TokenLogprobs, expected: TokenLogprobs) -> None:
    for ours, theirs in zip((got.chosen, *got.top), (expected.chosen, *expected.top), strict=True):
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert abs(ours.logprob - theirs.logprob) < 1e-4


def test_penalties_a_bitmask_and_scored_prompts_of_one_step_equal_the_host(runner: CudaRunner, cpu: Runner) -> None:
    penalties = Sampling(0.9, seed=2, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4)
    bitmask = np.zeros(9, dtype=np.uint32)
    bitmask[[1, 4]] = 0x0F0F0F0F
    chunks = (
        decode(1, 9, 7, penalties, prompt_token_ids=TOKENS[1][:9], output_token_ids=(7,)),
        decode(2, 0, 5, Sampling(0.9, seed=1), token_bitmask=bitmask),
        prompt(3, 0, 6, scoring=PromptScoring(TOKENS[3][1:6], 2)),
    )
    for one in (runner, cpu):
        run(one, prompt(1, 0, 9))
    got, expected = run(runner, *chunks), run(cpu, *chunks)
    assert tokens(got) == tokens(expected) and len(got.sampled) == 3
    assert len(got.prompt_logprobs[3]) == 5
    for ours, theirs in zip(got.prompt_logprobs[3], expected.prompt_logprobs[3], strict=True):
        assert_near(ours, theirs)
    assert got.kv_bytes_written == expected.kv_bytes_written > 0


def test_the_same_tokens_are_sampled_with_and_without_graphs(folder: Path, tmp_path: Path, runner: CudaRunner) -> None:
    without = device_runner(folder, tmp_path, open_torch_device(), use_graphs=False)
    assert generation(without) == generation(runner)


def test_a_run_ends_before_the_step_that_may_not_begin(runner: CudaRunner) -> None:
    run(runner, prompt(1, 0, 9))
    whole = tokens(run(runner, decode(1, 9, 7), num_steps=4))
    answers = iter([True, False])
    outcome = runner.run(Step((decode(1, 9, 7),), 4), lambda: next(answers))
    assert outcome.num_steps == 2 and tokens(outcome) == {1: whole[1][:2]}
    rest = run(runner, decode(1, 11, whole[1][1]), num_steps=2)
    assert whole[1][2:] == tokens(rest)[1], "its KV is where the next run expects it"


def test_no_element_outside_of_the_slots_of_a_step_is_written(folder: Path, tmp_path: Path) -> None:
    geometry = tiny_geometry(read_model_spec(folder), torch.float32)
    device = open_torch_device()
    pool = nan_pool(geometry, 8, torch.float32).to(device.torch_device)
    runner = device_runner(folder, tmp_path, device, pool=pool)
    values = pool.view(torch.float32)
    assert values.isnan().all(), "loading writes no KV"
    run(runner, prompt(1, 0, 9))
    run(runner, decode(1, 9, 7), decode(2, 0, 5), decode(3, 0, 5), num_steps=2)
    written = geometry.shape.kv_bytes_per_token // 4
    assert int((~values.isnan()).sum()) == (9 + 2 + 2 + 2) * written
    for job, count in ((1, 11), (2, 2), (3, 2)):
        first = int(geometry.block_offsets(TABLES[job][:1])[0])
        block = values[first : first + geometry.shape.token_block_bytes // 4]
        assert int((~block.isnan()).sum()) == count * written


def test_a_sequence_whose_logits_are_not_finite_fails_by_its_position_and_alone(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", SHAPES["untied, wide heads"])
    plain = device_runner(model, tmp_path, open_torch_device())
    run(plain, prompt(1, 0, 9), prompt(2, 0, 9))
    expected = tokens(run(plain, decode(1, 9, 7), decode(2, 9, 5), num_steps=4))
    damaged = expected[1][1]
    assert damaged not in expected[2] and damaged != expected[1][0]

    weights = image_weights(model, read_model_spec(model), tmp_path, torch.float32)
    weights["embed"][damaged] = torch.inf
    broken = device_runner(model, tmp_path, open_torch_device(), weights=weights)
    run(broken, prompt(1, 0, 9), prompt(2, 0, 9))
    outcome = run(broken, decode(1, 9, 7), decode(2, 9, 5), num_steps=4)
    assert tokens(outcome) == {1: expected[1][:2], 2: expected[2]}
    assert list(outcome.failed) == [1] and outcome.failed[1].kind is SequenceFailed
    assert "not finite after the token at position 11" in outcome.failed[1].reason
    outcome = run(broken, replace(prompt(3, 0, 5), token_ids=(8, damaged, 9)), decode(2, 13, 6))
    assert list(outcome.failed) == [3] and list(outcome.sampled) == [2]


def test_blocks_beyond_the_longest_sequence_are_not_used(runner: CudaRunner) -> None:
    run(runner, prompt(1, 0, 9))
    few = run(runner, decode(1, 9, 7), num_steps=2)
    more = replace(decode(1, 9, 7), block_ids=(*TABLES[1], 12, 13, 14, 15))
    assert tokens(run(runner, more, num_steps=2)) == tokens(few)


def test_a_sequence_with_every_token_banned_fails_alone(runner: CudaRunner) -> None:
    nothing = decode(1, 0, 5, banned=frozenset(range(259)))
    outcome = run(runner, nothing, decode(2, 0, 5))
    assert "no token may be sampled at output index" in outcome.failed[1].reason
    assert list(outcome.sampled) == [2]


class FaultyDevice(InterpretedDevice):
    """A device on which waiting raises an error, once it has one."""

    error: Exception | None = None

    def record(self) -> Event:
        if self.error is not None:
            raise self.error
        return super().record()


@pytest.fixture(scope="module")
def faulty(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FaultyDevice, CudaRunner]:
    device = FaultyDevice()
    return device, device_runner(folder, tmp_path_factory.mktemp("cache"), device)


@needs_interpreter
def test_a_fault_of_the_device_is_an_error_and_never_tokens(faulty: tuple[FaultyDevice, CudaRunner]) -> None:
    device, runner = faulty
    device.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceLost, match="a step of 2 tokens of 2 sequences: CUDA error: an illegal memory access"):
        run(runner, decode(1, 0, 5), decode(2, 0, 5))


@needs_interpreter
def test_a_step_for_which_the_device_has_no_memory_fails_and_the_next_is_computed(
    faulty: tuple[FaultyDevice, CudaRunner],
) -> None:
    device, runner = faulty
    device.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(DeviceError, match="a step of 1 tokens of 1 sequences: CUDA out of memory") as raised:
        run(runner, decode(1, 0, 5))
    assert not isinstance(raised.value, DeviceLost)
    device.error = None
    assert len(run(runner, decode(1, 0, 5)).sampled[1]) == 1


@needs_interpreter
def test_when_a_step_raises_the_device_has_finished_what_was_enqueued_of_it(folder: Path, tmp_path: Path) -> None:
    device = RefusingDevice()
    runner = device_runner(folder, tmp_path, device)
    device.refused = "download"  # after the forward pass, which writes KV
    for chunks, num_steps in (((prompt(1, 0, 9),), 1), ((decode(1, 9, 7), decode(2, 0, 5)), 3)):
        with pytest.raises(DeviceError, match="CUDA out of memory"):
            run(runner, *chunks, num_steps=num_steps)
        assert device.calls[-2:] == ["refused", "waited"], "the blocks may be another sequence's from now on"


def test_a_sequence_past_the_longest_one_is_refused_before_a_kernel_reads_its_positions(runner: CudaRunner) -> None:
    blocks = (*TABLES[1], 12, 13)
    last = replace(decode(1, 62, 7), block_ids=blocks)
    for chunk, num_steps in ((replace(prompt(1, 0, 5), start=60, block_ids=blocks), 1), (last, 3)):
        with pytest.raises(ValueError, match=r"a sequence has 65 tokens; the runner is for 64"):
            run(runner, chunk, num_steps=num_steps)
    assert run(runner, last, num_steps=2).num_steps == 2
