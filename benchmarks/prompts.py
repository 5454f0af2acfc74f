"""Fifty chat prompts: short and long, ordinary and unusual, in several languages; and files of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loadtest.files import read_jsonl

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three primary colours.",
    "Write a haiku about autumn.",
    "What is 17 + 25?",
    "Explain photosynthesis to a child.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "What is the boiling point of water at sea level?",
    "List five animals that can fly.",
    "Write a short story about a lost key.",
    "How do I tie a tie?",
    "What is a prime number? Give three examples.",
    "Summarise: The quick brown fox jumps over the lazy dog while the cat watches from the window.",
    "Write a Python function that adds two numbers.",
    "What is the largest planet in the solar system?",
    "Give two reasons to exercise every day.",
    "What does HTTP stand for?",
    "Complete the sentence: The early bird",
    "Is a tomato a fruit or a vegetable?",
    "Convert 100 degrees Fahrenheit to Celsius.",
    "Write an email that declines an invitation politely.",
    "What are the seasons of the year?",
    "Tell me a joke about computers.",
    "How many continents are there?",
    "What is the difference between a lake and a sea?",
    "Describe the taste of a lemon.",
    "¿Cuál es la capital de España?",
    "Wie heißt die Hauptstadt von Österreich?",
    "法国的首都是哪里？",
    "Write the numbers from 1 to 10 in words.",
    "What is gravity?",
    "Suggest a name for a small grey cat.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Write a limerick about a baker.",
    "Explain what a GPU is in one sentence.",
    "What is the square root of 144?",
    "Give me three tips for a job interview.",
    "What happens when ice melts?",
    "Reverse the word 'stressed'.",
    "Write a SQL query that selects all users older than 30.",
    "What is the opposite of 'generous'?",
    "Who painted the Mona Lisa?",
    "How long does light take from the Sun to the Earth?",
    "I have three apples and eat one. How many are left?",
    "Write one sentence with the words river, lamp and Tuesday.",
    "What is an API? Answer for someone who has never programmed. " * 3,
    "Here is a list: milk, bread, eggs, butter, cheese, apples, rice, beans, coffee, tea. Sort it by alphabet.",
    "The following text repeats. " * 20 + "What does the text do?",
)


def prompts_of(files: Sequence[Path], most_of_a_file: int = 300) -> list[str]:
    """The prompts of all JSONL files, of each at most ``most_of_a_file``."""
    return [item["prompt"] for path in files for _, item in list(read_jsonl(path))[:most_of_a_file]]


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Writes a JSONL file for a workload with ``prompts=FILE``."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
