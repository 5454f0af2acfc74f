"""What a type checker says of programs that use the clients: those in the documentation and those that are wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAD = """
from collections.abc import Sequence
from muxmesh.client import Message, MeshClient, Prompt, RequestOptions, SyncMeshClient
def sync(client: SyncMeshClient, options: RequestOptions, turns: list[dict[str, str]], ids: list[int]) -> None:
    {line}
async def aio(client: MeshClient, options: RequestOptions, turns: list[dict[str, str]], ids: list[int]) -> None:
    {async_line}
"""
RIGHT = [
    "client.generate('x', max_new_tokens=5, temperature=0, top_k=None, stop_strings='end')",
    "client.generate([{'role': 'user', 'content': 'hi'}])",
    "client.generate(turns)",
    "client.generate(ids)",
    "client.generate([Message('user', 'hi')])",
    "client.generate_many('x', num_sequences=2)",
    "client.generate_many('x', **options)",
]
WRONG = [
    ("client.generate('x', max_tokens=5)", 'Unexpected keyword argument "max_tokens"'),
    ("client.generate('x', num_sequences=2)", 'Unexpected keyword argument "num_sequences"'),
    ("client.generate_many('x', temprature=1.0)", 'Unexpected keyword argument "temprature"'),
    ("client.generate('x', temperature='hot')", 'Argument "temperature"'),
    ("client.generate('x', kv_swap_format='int4')", 'Argument "kv_swap_format"'),
    ("client.generate('x', stop_token_ids=['a'])", "List item 0 has incompatible type"),
    ("client.generate(['a'])", 'has incompatible type "list[str]"'),
    ("client.generate([{'role': 5}])", 'has incompatible type "list[dict[str, int]]"'),
]
STREAMS = """
from muxmesh.client import MeshClient, SyncMeshClient
def sync(client: SyncMeshClient) -> str:
    stream = client.stream("x", seed=5)
    text = "".join(delta.text for delta in stream)
    stream.close()
    client.stream("x", max_tokens=5)
    return text
async def aio(client: MeshClient) -> str:
    stream = client.stream("x", seed=5)
    text = "".join([delta.text async for delta in stream])
    await stream.aclose()
    client.stream("x", max_tokens=5)
    return text
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The errors of one run of mypy --strict, by the name of the program."""
    programs = {f"right{number}": program(line) for number, line in enumerate(RIGHT)}
    programs |= {f"wrong{number}": program(line) for number, (line, _) in enumerate(WRONG)}
    programs |= {"streams": STREAMS, "readme": examples("README.md"), "guide": examples("docs/python_client.md")}
    folder = tmp_path_factory.mktemp("programs")
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    files = [str(folder / f"{name}.py") for name in programs]
    options = ["--strict", "--config-file", "", "--follow-imports", "silent", "--cache-dir", str(folder / "cache")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 1 and not checked.stderr, checked.stderr
    found: dict[str, list[str]] = {name: [] for name in programs}
    for line in checked.stdout.splitlines():
        if match := re.match(r".*?(\w+)\.py:\d+: error: (.*)", line):
            found[match[1]].append(match[2])
    return found


def program(line: str) -> str:
    return HEAD.format(line=line, async_line=f"await {line}")


def examples(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def test_programs_that_work_have_no_type_errors(errors: dict[str, list[str]]) -> None:
    assert {name: errors[f"right{number}"] for number, name in enumerate(RIGHT)} == {name: [] for name in RIGHT}


def test_the_examples_of_the_documentation_have_no_type_errors(errors: dict[str, list[str]]) -> None:
    assert errors["readme"] == errors["guide"] == []


@pytest.mark.parametrize(("number", "problem"), [(number, problem) for number, (_, problem) in enumerate(WRONG)])
def test_a_wrong_option_is_a_type_error_of_both_clients(
    errors: dict[str, list[str]], number: int, problem: str
) -> None:
    found = errors[f"wrong{number}"]
    assert len(found) == 2 and all(problem in error for error in found), found


def test_a_misspelt_option_of_a_stream_is_a_type_error_of_both_clients(errors: dict[str, list[str]]) -> None:
    assert [error.split(" for ")[0] for error in errors["streams"]] == ['Unexpected keyword argument "max_tokens"'] * 2
