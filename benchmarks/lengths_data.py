"""Output lengths from public files, for the benchmarks of the predictor and of the policies."""

from __future__ import annotations

import random
from pathlib import Path

from loadtest.files import read_jsonl
from muxmesh.predictor.evaluate import Item

ALPACA_MODELS = (
    "vicuna-13b", "Meta-Llama-3-8B-Instruct", "Mistral-7B-Instruct-v0.2", "Qwen1.5-7B-Chat", "alpaca-7b", "gemma-2b-it",
    "llama-2-7b-chat-hf", "gpt4",
)  # fmt: skip
TASKS = ("alpaca_eval_dev", "gsm8k_train", "code_alpaca", "rasbt_instructions")
SERVED = "served"


def alpaca_items(folder: Path, seed: int | None = None) -> list[Item]:
    """AlpacaEval: for each prompt, the outputs of up to 8 models. The prompts are shuffled if there is a seed."""
    rows = [row for _, row in read_jsonl(folder / "alpaca_eval_dev.jsonl.gz")]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return [
        Item(row["prompt"], model, max(1, row["n_out"][model]))
        for row in rows
        for model in ALPACA_MODELS
        if model in row["n_out"]
    ]


def stream_items(folder: Path, each: int, seed: int) -> list[Item]:
    """Prompts of four tasks, at most ``each`` of one, in random order, as outputs of a single model."""
    rng = random.Random(seed)
    items = []
    for task in TASKS:
        rows = [row for _, row in read_jsonl(folder / f"{task}.jsonl.gz")]
        rng.shuffle(rows)
        for row in rows[:each]:
            lengths = row["n_out"]
            length = lengths["vicuna-13b"] if isinstance(lengths, dict) else lengths
            items.append(Item(row["prompt"], SERVED, max(1, length), task))
    rng.shuffle(items)
    return items
