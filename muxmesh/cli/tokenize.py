"""`muxmesh tokenize`: the token ids of a text, with the text of each token; or the text of token ids."""

from __future__ import annotations

import argparse
import asyncio
import sys

from muxmesh.cli.common import print_json, read_all
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.terminal_text import harmless
from muxmesh.client import Conversation, Message, Tokenized
from muxmesh.errors import InvalidRequest
from muxmesh.quoting import quoted


def run(arguments: argparse.Namespace) -> int:
    """Prints tokens or text; returns the exit code."""
    return asyncio.run(_tokenize(arguments))


async def _tokenize(arguments: argparse.Namespace) -> int:
    given = read_all() if arguments.text == "-" else arguments.text
    async with client_of(arguments, arguments.address) as client:
        if arguments.decode:
            if arguments.chat:
                raise InvalidRequest("chat", "--decode takes token ids, no conversation")
            text = await client.detokenize(_token_ids(given), model=arguments.model)
            if arguments.json:
                print_json({"text": text})
            else:
                print(harmless(text, sys.stdout))
            return 0
        prompt: str | Conversation = [Message("user", given)] if arguments.chat else given
        adds = False if arguments.no_special_tokens else None
        tokenized = await client.tokenize(prompt, model=arguments.model, add_special_tokens=adds, with_texts=True)
    if arguments.json:
        print_json(
            {
                "token_ids": tokenized.token_ids,
                "num_tokens": len(tokenized.token_ids),
                "max_model_len": tokenized.max_model_len,
                "token_texts": tokenized.texts,
                "token_bytes": [list(one) for one in tokenized.token_bytes],
            }
        )
    else:
        _print_lines(tokenized)
    return 0


def _token_ids(text: str) -> list[int]:
    """The numbers between spaces, commas or the brackets of a JSON list. Raises InvalidRequest."""
    parts = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    return [_token_id(part) for part in parts]


def _token_id(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        problem = f"{quoted(text)} is not a whole number; token ids are separated by spaces or commas"
        raise InvalidRequest("token_ids", problem) from None


def _print_lines(tokenized: Tokenized) -> None:
    """One token a line: its id and its text, quoted, or its bytes if these are a part of a character."""
    for token_id, text, token_bytes in zip(tokenized.token_ids, tokenized.texts, tokenized.token_bytes, strict=True):
        shown = text if text.encode() == token_bytes else token_bytes
        print(f"{token_id:>7} {shown!r}")
    print(f"[{len(tokenized.token_ids)} tokens; the context holds {tokenized.max_model_len}]", file=sys.stderr)
