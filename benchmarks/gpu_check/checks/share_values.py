"""Whether what a model computes depends on its share of the SMs: products, steps and whole meshes under MPS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.mps_daemon import mps_client, mps_daemon
from benchmarks.gpu.operation_trace import TracedTensor, first_difference, first_not_finite
from benchmarks.gpu.peer import Peer, PeerError
from benchmarks.gpu.random_model import SMALL, TINY, write_random_model
from benchmarks.gpu_check.check import Findings
from benchmarks.gpu_check.gpu_mesh import PROMPTS, differing, gpu_unit, mesh

LOAD: dict[str, Any] = {
    "model": "half billion", "dtype": "bfloat16", "pool_tokens": 16_384, "max_num_seqs": 16, "step_tokens": 1024,
    "max_len": 2048,
}  # fmt: skip
DRY_LOAD: dict[str, Any] = {
    "model": "tiny", "dtype": "float32", "pool_tokens": 512, "max_num_seqs": 2, "step_tokens": 32, "max_len": 64,
}  # fmt: skip
STEPS = {"prompt": 1024, "batch": 16, "context": 512, "repeats": 5}
DRY_STEPS = {"prompt": 20, "batch": 2, "context": 20, "repeats": 1}
SHARES, DRY_SHARES = (100, 40, 30, 40, 30), (100, 40)
PERCENTAGES = (12, 30, 40, 70)
OUTSIDE = "outside MPS"
MOST_ERROR = 0.02
"""Of a product in bf16, over its largest value. bf16 has 8 bits, and a split product adds parts that are rounded."""
MOST_DIFFERENCE = 0.05
"""Between norms: kernels of different tiles round differently, and layers carry it on."""

Report = dict[str, Any]
"""What one peer found: `products`, `row operations`, `steps`; see `ValueOperations`."""


def shares_values(findings: Findings, is_dry_run: bool) -> None:
    """The same weights, prompt and KV in a process outside MPS and in clients with shares of 100, 40 and 30 percent.

    The shares are those of green contexts. Each client alone, all clients at once, and at last with NaN in all memory
    that torch has free. A client with a percentage of MPS either computes the same or refuses to load the model.
    """
    asyncio.run(_compare_shares(findings, is_dry_run))


async def _compare_shares(findings: Findings, is_dry_run: bool) -> None:
    async with mps_daemon() as control:
        with contextlib.ExitStack() as stack:
            peers = {OUTSIDE: stack.enter_context(Peer("values"))}
            shares = DRY_SHARES if is_dry_run else SHARES
            for index, share in enumerate(shares):
                client = peers[f"client {index + 1}, {share} %"] = stack.enter_context(
                    mps_client(control, 100, "values")
                )
                client.ask("green", shares=shares, index=index)
            _ask_all(peers, "load", **(DRY_LOAD if is_dry_run else LOAD))
            findings.figure("SMs", {name: one["torch_sms"] for name, one in _ask_all(peers, "info").items()})
            for name, bad in _ask_all(peers, "generated").items():
                findings.expect(f"{name}: random weights made on the device are finite", not bad, bad[:3])
            clients = {name: peer for name, peer in peers.items() if name != OUTSIDE}
            alone: dict[str, Report] = {}
            for name, peer in peers.items():
                alone |= _reports({name: peer}, is_dry_run)
                _judge(findings, f"{name}, alone", alone[name], alone[OUTSIDE])
            for name, report in _reports(clients, is_dry_run).items():
                _judge(findings, f"{name}, all at once", report, alone[OUTSIDE])
            _ask_all(peers, "poison")
            for name, report in _reports(peers, is_dry_run, with_decode=is_dry_run).items():
                _judge(findings, f"{name}, free memory is NaN", report, alone[OUTSIDE])
        if not is_dry_run:
            with contextlib.ExitStack() as stack:
                limited = {share: stack.enter_context(mps_client(control, share, "values")) for share in PERCENTAGES}
                for peer in limited.values():
                    peer.tell("load", **LOAD)
                for share, peer in limited.items():
                    _judge_percentage(findings, f"MPS percentage {share}", peer, alone[OUTSIDE])


def _judge_percentage(findings: Findings, name: str, peer: Peer, expected: Report) -> None:
    """A client that has loaded the model computes it as outside MPS; one that has not names what would be right."""
    try:
        peer.reply(90)
    except PeerError as error:
        findings.figure(name, str(error))
        findings.expect(f"{name}: refused because products are wrong", "green_contexts" in str(error), str(error))
    else:
        (report,) = _reports({name: peer}, is_dry_run=False).values()
        _judge(findings, name, report, expected)


def _ask_all(peers: Mapping[str, Peer], operation: str, **arguments: Any) -> dict[str, Any]:
    for peer in peers.values():
        peer.tell(operation, **arguments)
    return {name: peer.reply(90) for name, peer in peers.items()}


def _reports(peers: Mapping[str, Peer], is_dry_run: bool, with_decode: bool = True) -> dict[str, Report]:
    """The report of each peer, all of them at once."""
    steps = DRY_STEPS if is_dry_run else STEPS
    steps = steps if with_decode else {**steps, "batch": 0}
    products = _ask_all(peers, "products", rows=[1, 16, steps["prompt"]])
    rows = _ask_all(peers, "row_operations", rows=steps["prompt"])
    found = _ask_all(peers, "steps", **steps)
    return {name: {"products": products[name], "rows": rows[name], "steps": found[name]} for name in peers}


def _judge(findings: Findings, name: str, report: Report, expected: Report) -> None:
    """Compares the report of one peer with f32 and with that of the peer outside MPS."""
    wrong = [one for one in (*report["products"], *report["rows"]) if not _is_close(one)]
    worst = max((one["error"] for one in (*report["products"], *report["rows"])), default=None)
    findings.expect(f"{name}: products, norm and gate agree with f32", not wrong, wrong or worst)
    steps, others = report["steps"], expected["steps"]
    failures = steps["failures"]
    findings.expect(f"{name}: no step fails", not failures, f"{len(failures)} failed: {failures[:1]}")
    trace, reference = _traced(steps), _traced(others)
    bad = first_not_finite(trace)
    findings.expect(f"{name}: all that a prompt computes is finite", bad is None, _around(trace, reference, bad))
    differs = first_difference(trace, reference, MOST_DIFFERENCE)
    findings.expect(f"{name}: norms as outside MPS", differs is None, _around(trace, reference, differs))
    is_likely = others["token"] in steps["largest"]
    findings.expect(f"{name}: the first token is among the likely ones", is_likely, (steps["token"], steps["largest"]))
    pairs = zip(steps["decode tokens"], others["decode tokens"], strict=False)
    same = [one is not None and one == other for one, other in pairs]
    if same:
        findings.expect(f"{name}: most decode tokens as outside MPS", 4 * sum(same) >= 3 * len(same), sum(same))


def _is_close(product: Mapping[str, Any]) -> bool:
    return bool(product["is_finite"]) and product["error"] <= MOST_ERROR


def _traced(steps: Mapping[str, Any]) -> list[TracedTensor]:
    return [TracedTensor(name, float("nan") if norm is None else norm) for name, norm in steps["trace"]]


def _around(trace: Sequence[TracedTensor], reference: Sequence[TracedTensor], at: int | None) -> list[str] | None:
    """The tensors up to the one at this index, with the norms that are expected."""
    if at is None:
        return None
    first = max(0, at - 4)
    pairs = zip(trace[first : at + 2], reference[first : at + 2], strict=False)
    return [f"{number}: {one.name}: {one.norm:g}, {other.norm:g}" for number, (one, other) in enumerate(pairs, first)]


def shares_tokens(findings: Findings, is_dry_run: bool) -> None:
    """Greedy tokens of a mesh with shares of 40 and 30 percent are those of the same mesh without MPS.

    In bf16 products of other tiles round differently and logits are often equal, so equal tokens are an aim there.
    """
    sizes, device = (TINY, "cpu") if is_dry_run else (SMALL, "cuda")
    with TemporaryDirectory(prefix="mm-") as scratch:
        models = [
            {
                "name": dtype, "dtype": dtype, "max_num_seqs": 8,
                "source": str(write_random_model(Path(scratch) / dtype, sizes, dtype, device)),
            }
            for dtype in (("float32",) if is_dry_run else ("float32", "bfloat16"))
        ]  # fmt: skip
        asyncio.run(_compare_tokens(findings, {**gpu_unit(is_dry_run), "models": models}, is_dry_run))


async def _compare_tokens(findings: Findings, unit: Mapping[str, Any], is_dry_run: bool) -> None:
    count = 4 if is_dry_run else 32
    shared = [{**model, "compute_share": {"prefill": 40, "decode": 30}} for model in unit["models"]]
    off = await _greedy_tokens({**unit, "mps": "off"}, count)
    on = await _greedy_tokens({**unit, "mps": "on", "models": shared}, count)
    for dtype, expected in off.items():
        judge = findings.expect if dtype == "float32" else findings.aim
        found = on[dtype]
        judge(f"{dtype}: tokens under MPS as without it", found == expected, differing(found, expected))


async def _greedy_tokens(unit: Mapping[str, Any], count: int) -> dict[str, list[list[int]]]:
    """Tokens of all prompts by model, all at once. Raises an error of the mesh if a request fails."""
    async with mesh({"units": [unit]}) as running:

        async def of_model(name: str) -> list[list[int]]:
            outputs = await asyncio.gather(
                *(
                    running.client.generate(prompt, model=name, max_new_tokens=count, temperature=0, ignore_eos=True)
                    for prompt in PROMPTS
                )
            )
            return [list(one.token_ids) for one in outputs]

        names = [model["name"] for model in unit["models"]]
        return dict(zip(names, await asyncio.gather(*map(of_model, names)), strict=True))
