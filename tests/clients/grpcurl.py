"""grpcurl: JSON on the command line, with the descriptors of reflection or of the proto files."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_INFERENCE, _MESH = "muxmesh.v1.Inference", "muxmesh.v1.Mesh"
_STOPPING = {"max_new_tokens": 8, "ignore_eos": True}
_LONG = {"model": "slow", "text": "a", "stopping": {"max_new_tokens": 2000, "ignore_eos": True}}
_LARGEST_SEED = str((1 << 63) - 1)
_TIMEOUT_S = 60


class Grpcurl:
    """Calls of one mesh. ``protos`` None: descriptors come from the server's reflection."""

    def __init__(self, binary: Path, address: str, protos: Path | None) -> None:
        self._address = address
        self._command = [str(binary), "-plaintext", "-max-time", "30", "-emit-defaults"]
        if protos is not None:
            files = ("muxmesh/v1/inference.proto", "muxmesh/v1/mesh.proto")
            self._command += ["-import-path", str(protos), *(part for file in files for part in ("-proto", file))]

    def checks(self) -> dict[str, Callable[[], None]]:
        """Name → check, which raises if it fails."""
        return {
            "list models": self._list_models,
            "generate": self._generate,
            "stream": self._stream,
            "chat": self._chat,
            "seed": self._seed,
            "log-probabilities": self._log_probabilities,
            "tokenize": self._tokenize,
            "refusal": self._refusal,
            "cancel": self._cancel,
            "deadline": self._deadline,
        }

    def _run(self, method: str, request: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
        command = [*self._command, *options, "-d", json.dumps(request), self._address, method]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)

    def _call(self, method: str, request: dict[str, Any]) -> list[Any]:
        """The messages of a call that succeeds."""
        done = self._run(method, request)
        assert done.returncode == 0, done.stderr
        decoder, rest, messages = json.JSONDecoder(), done.stdout.lstrip(), []
        while rest:
            message, end = decoder.raw_decode(rest)
            messages.append(_in_camel_case(message))
            rest = rest[end:].lstrip()
        return messages

    def _generated(self, **request: Any) -> Any:
        (response,) = self._call(f"{_INFERENCE}/Generate", {"stopping": _STOPPING, **request})
        return response

    def _list_models(self) -> None:
        (response,) = self._call(f"{_MESH}/ListModels", {})
        assert sorted(model["name"] for model in response["models"]) == ["sim", "slow", "tiny"]
        listed = subprocess.run(
            [*self._command, self._address, "list"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        ).stdout
        assert {_INFERENCE, _MESH} <= set(listed.split())

    def _generate(self) -> None:
        response = self._generated(model="sim", text="Hello")
        assert response["outputs"]["numTokens"] == 8 and response["promptInfo"]["numPromptTokens"] == 5
        assert response["outputs"]["finishInfo"]["finishReason"] == "LENGTH"

    def _stream(self) -> None:
        request = {
            "model": "sim", "text": "Hello", "stopping": _STOPPING, "sampling": {"seed": 7},
            "response": {"output_token_ids": True},
        }  # fmt: skip
        outputs = [message["outputs"] for message in self._call(f"{_INFERENCE}/GenerateStream", request)]
        whole = self._generated(**request)["outputs"]
        assert "".join(output["text"] for output in outputs) == whole["text"]
        assert [token for output in outputs for token in output["tokenIds"]] == whole["tokenIds"]
        assert len(whole["tokenIds"]) == 8

    def _chat(self) -> None:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo"}]
        assert self._generated(model="tiny", chat={"messages": turns})["outputs"]["numTokens"] == 8

    def _seed(self) -> None:
        request = {"model": "tiny", "text": "a", "temperature": 1}
        drawn = self._generated(**request)
        seed = drawn["promptInfo"]["seed"]
        assert isinstance(seed, str) and int(float(seed)) == int(seed), "JSON has 64-bit integers as strings"
        again = self._generated(**request, sampling={"seed": int(seed)})
        assert again["outputs"]["text"] == drawn["outputs"]["text"]
        assert self._generated(**request, sampling={"seed": _LARGEST_SEED})["promptInfo"]["seed"] == _LARGEST_SEED

    def _log_probabilities(self) -> None:
        options = {
            "output_token_ids": True, "prompt_token_ids": True, "output_logprobs": True,
            "output_candidates": {"top_n": 2}, "prompt_logprobs": True,
        }  # fmt: skip
        response = self._generated(model="tiny", text="abc", temperature=0, response=options)
        names = ("logprobs", "ranks", "candidateTokens", "tokenTexts", "tokenBytes", "tokenIds")
        for columns in (response["outputs"], response["promptInfo"]):
            assert len({len(columns[name]) for name in names}) == 1
        assert set(response["outputs"]["ranks"]) == {1}
        assert "".join(response["promptInfo"]["tokenTexts"]) == "abc"

    def _tokenize(self) -> None:
        request = {"model": "sim", "text": "héllo", "token_texts": True}
        (tokenized,) = self._call(f"{_INFERENCE}/Tokenize", request)
        assert tokenized["numTokens"] == 6
        (back,) = self._call(f"{_INFERENCE}/Detokenize", {"model": "sim", "token_ids": tokenized["tokenIds"]})
        assert back["text"] == "héllo"

    def _refusal(self) -> None:
        done = self._run(f"{_INFERENCE}/Generate", {"model": "sim", "text": "a", "sampling": {"top_p": 0}})
        assert done.returncode != 0
        assert "InvalidArgument" in done.stderr and "sampling.top_p: is 0.0" in done.stderr, done.stderr
        assert "google.rpc.BadRequest" in done.stderr, done.stderr

    def _cancel(self) -> None:
        """Ends grpcurl in the middle of a stream, as Ctrl-C does."""
        command = [*self._command, "-d", json.dumps(_LONG), self._address, f"{_INFERENCE}/GenerateStream"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None and running.stdout.readline()
            running.terminate()
        self._until_idle()

    def _deadline(self) -> None:
        done = self._run(f"{_INFERENCE}/GenerateStream", _LONG, "-max-time", "0.5")
        assert done.returncode != 0 and "DeadlineExceeded" in done.stderr, done.stderr
        self._until_idle()

    def _until_idle(self) -> None:
        """Waits until nothing runs on the mesh, for ten seconds at most."""
        for _ in range(100):
            (status,) = self._call(f"{_MESH}/GetStatus", {})
            if all(model["numRequestsRunning"] == 0 for model in status["models"]):
                return
            time.sleep(0.1)
        raise AssertionError("the request still runs after 10 s")


def _in_camel_case(content: Any) -> Any:
    """JSON content with the names that the proto files give: descriptors of reflection have the fields' own names."""
    if isinstance(content, list):
        return [_in_camel_case(one) for one in content]
    if not isinstance(content, dict):
        return content
    return {
        re.sub("_(.)", lambda match: match[1].upper(), name): _in_camel_case(value) for name, value in content.items()
    }
