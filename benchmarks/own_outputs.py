"""Output lengths of the served model, for the predictor: `python -m benchmarks.own_outputs OUT.jsonl JSONL ...`.

Starts the default mesh, sends the prompts of the files as chats at temperature 0.7, each with its own seed, and appends
{prompt, model, n_out, censored, task, seed} to OUT, one object a line. censored: the output was cut off at the cap.
Prompts that OUT has already are skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path
from zlib import crc32

import uvloop

from benchmarks.mesh_process import up
from benchmarks.report import OUT
from loadtest.files import read_jsonl
from muxmesh.client import MeshClient, Message
from muxmesh.config.schema import DEFAULT_MODEL

_AT_ONCE = 16
_TEMPERATURE = 0.7


async def collect(out: Path, files: list[Path], each: int, cap: int, seed: int) -> int:
    """Generates the missing outputs."""
    rng = random.Random(seed)
    asked = {(line["task"], line["prompt"]) for _, line in read_jsonl(out)} if out.exists() else set()
    prompts = []
    for path in files:
        task = path.name.partition(".")[0]
        rows = [row["prompt"] for _, row in read_jsonl(path)]
        rng.shuffle(rows)
        prompts += [(task, prompt) for prompt in rows[:each] if (task, prompt) not in asked]
    rng.shuffle(prompts)
    config = {"units": [{"models": [{"name": DEFAULT_MODEL, "max_num_seqs": _AT_ONCE, "default_max_new_tokens": cap}]}]}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "own_outputs_mesh.yaml"
    path.write_text(json.dumps(config))
    async with up("-c", str(path)) as mesh:
        with out.open("a") as written:
            slots = asyncio.Semaphore(_AT_ONCE)

            async def ask(task: str, prompt: str) -> None:
                own_seed = seed + crc32(prompt.encode())
                async with slots:
                    count, ended = await _length(mesh.client, prompt, cap, own_seed)
                line = {"prompt": prompt, "model": DEFAULT_MODEL, "n_out": count, "censored": not ended, "task": task}
                written.write(json.dumps(line | {"seed": own_seed}) + "\n")
                written.flush()

            async with asyncio.TaskGroup() as group:
                for task, prompt in prompts:
                    group.create_task(ask(task, prompt))
    return 0


async def _length(client: MeshClient, prompt: str, cap: int, seed: int) -> tuple[int, bool]:
    """Tokens of the output, and whether it stopped before the cap."""
    completion = await client.generate(
        [Message("user", prompt)], model=DEFAULT_MODEL, max_new_tokens=cap, temperature=_TEMPERATURE, seed=seed
    )
    return completion.finish.num_output_tokens, completion.finish.reason == "stop"


def main() -> int:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=500, help="prompts taken from each file")
    parser.add_argument("--cap", type=int, default=384, help="longest output in tokens")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(collect(arguments.out, arguments.files, arguments.each, arguments.cap, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
