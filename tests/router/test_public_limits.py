import dataclasses
from typing import Any

import pytest

from muxmesh.config.schema import RouterConfig
from muxmesh.config.section import MIB
from muxmesh.v1 import inference_pb2
from router import request_validation as valid
from router.public_limits import public_limits
from tests.support.pipeline_parts import served_model

CONTEXT = 5000
VOCABULARY = 49_152


def served(name: str, context: int, vocab_size: int) -> Any:
    model = served_model(name, max_model_len=context)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, vocab_size=vocab_size))


def limits(config: RouterConfig, max_open_files: int = 10_000) -> Any:
    models = [served("a", CONTEXT, 1000), served("b", 100, VOCABULARY)]
    return public_limits(config, models, max_open_files)


def test_the_largest_valid_request_fits_into_a_message() -> None:
    config = RouterConfig(max_prompt_bytes=10 * MIB)
    largest = inference_pb2.GenerateRequest(
        request_id="r" * valid.MAX_REQUEST_ID,
        model="m" * 64,
        chat=inference_pb2.ChatPrompt(
            messages=[
                inference_pb2.ChatMessage(role="assistant", content="x" * (10 * MIB // valid.MAX_MESSAGES))
                for _ in range(valid.MAX_MESSAGES)
            ]
        ),
        token_ids=inference_pb2.TokenIds(ids=[VOCABULARY - 1] * CONTEXT),
        stopping=inference_pb2.StoppingOptions(
            stop_strings=["\U0001f600" * valid.MAX_STOP_STRING] * valid.MAX_STOP_STRINGS,
            stop_token_ids=[VOCABULARY - 1] * valid.MAX_STOP_TOKEN_IDS,
        ),
        decoding=inference_pb2.DecodingOptions(
            logit_bias={VOCABULARY - 1 - index: -100.0 for index in range(valid.MAX_LOGIT_BIAS)},
        ),
        kv=inference_pb2.KvOptions(cache_salt="\U0001f600" * valid.MAX_CACHE_SALT),
    )
    size = largest.ByteSize() + 4 * VOCABULARY  # every token as an allowed one
    assert size <= limits(config).max_message_bytes <= size + MIB


@pytest.mark.parametrize(
    ("max_connections", "max_open_files", "expected"), [(50, 10_000, 50), (5000, 1024, 768), (5000, 100, 16)]
)
def test_connections_leave_descriptors_to_the_router(max_connections: int, max_open_files: int, expected: int) -> None:
    config = RouterConfig(max_connections=max_connections)
    assert limits(config, max_open_files).max_connections == expected
