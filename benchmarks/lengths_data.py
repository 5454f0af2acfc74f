"""Answer lengths from public files, as the predictor and policy benchmarks want them."""

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
    """AlpacaEval: each prompt with the lengths of up to 8 models one after the other; shuffled if there is a seed."""
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
    """Four tasks in one stream, at most ``each`` prompts of one, as if one model had answered all of them."""
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
