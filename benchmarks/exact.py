"""Greedy tokens of a mesh against those of transformers: the default model, f32, 50 chat prompts x 32 tokens."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.mesh_process import up
from benchmarks.prompts import PROMPTS
from benchmarks.report import Report
from muxmesh.cli.common import cache_dir
from muxmesh.client import Message
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import model_folder

NUM_TOKENS = 32


async def mesh_tokens() -> tuple[list[list[int]], float]:
    """Token ids of each output, with all prompts sent at once, and the seconds that it took."""
    async with up() as mesh:
        started_at_s = time.monotonic()
        completions = await asyncio.gather(
            *(
                mesh.client.generate([Message("user", prompt)], temperature=0, max_new_tokens=NUM_TOKENS)
                for prompt in PROMPTS
            )
        )
        return [list(one.token_ids) for one in completions], time.monotonic() - started_at_s


def reference_tokens(folder: Path) -> list[list[int]]:
    """Token ids of each output of transformers, one prompt at a time."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    outputs = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(prompt_ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        outputs.append([int(token) for token in out[0, prompt_ids.shape[1] :]])
    return outputs


def main() -> int:
    """Compares; exit code 1 if any token differs."""
    ours, seconds = asyncio.run(mesh_tokens())
    reference = reference_tokens(model_folder(CATALOG[DEFAULT_MODEL], cache_dir()))
    same = [mine == other for mine, other in zip(ours, reference, strict=True)]
    report = Report("exact")
    report.figures = {
        "num_prompts": len(PROMPTS),
        "num_tokens": sum(map(len, ours)),
        "mesh_s": seconds,
        "differing_prompts": [PROMPTS[i] for i, equal in enumerate(same) if not equal],
    }
    report.bar("prompts with identical tokens", sum(same), f"all {len(PROMPTS)}", all(same))
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
