import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from muxmesh.errors import ModelUnsupported
from muxmesh.models.file_fields import FileFields
from muxmesh.models.gguf_import import import_gguf
from muxmesh.models.gguf_tokenizer import build_tokenizer, check_tokenizer, eos_token_ids
from muxmesh.models.tokenizer import load_text_model
from tests.support.gguf_files import write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_fields(pre: str = "gpt-2", words: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """A byte-level BPE vocabulary: `<eos>`, `<bos>`, one token per byte, ``words`` and the user-defined `<tool>`."""
    tokens = ["<eos>", "<bos>", *BYTES, *words, "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 3), USER_DEFINED],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def encode(fields: dict[str, Any], text: str) -> list[str]:
    return build_tokenizer(fields).encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("kind", "pre"), [("llama", None), ("gpt2", "gpt-2"), ("gpt2", "smollm"), ("gpt2", "llama-bpe"), ("gpt2", "qwen2")]
)
def test_a_supported_kind_passes_the_check(kind: str, pre: str | None) -> None:
    check_tokenizer(
        FileFields(
            Path("m.gguf"),
            {
                "tokenizer.ggml.model": kind,
                "tokenizer.ggml.pre": pre,
                "tokenizer.ggml.tokens": ["a", "b"],
                "tokenizer.ggml.scores": [-1.0, -2.0],
                "tokenizer.ggml.merges": [],
            },
        )
    )


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "tekken"), ("gpt2", None), ("bert", "gpt-2"), (None, None)])
def test_an_unsupported_kind_is_rejected_with_the_supported_ones(kind: str | None, pre: str | None) -> None:
    supported = "supported: llama, gpt2/gpt-2, gpt2/smollm, gpt2/llama-bpe"
    with pytest.raises(ModelUnsupported, match=f"tokenizer {kind}/{pre} is not supported; {supported}"):
        check_tokenizer(FileFields(Path("m.gguf"), {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": pre}))


def test_the_tokenizer_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", lambda done, total: None)
    ours, theirs = load_text_model(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in ("hello 2024", "<|im_start|>hell<|im_end|>", "  é\n"):
        assert ours.encode(text, True) == theirs(text).input_ids
        assert ours.decode(ours.encode(text, True), False) == text
    assert ours.render_chat([{"role": "user", "content": "hell"}]) == "hell"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġok", "ĊĊ", "ĠY"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "ĊĊ", "ĠY"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġok", "ĊĊ", "ĠY"]),
        ("llama-v3", ["It", "'s", "Ġ", "123", "45", "Ġok", "ĊĊ", "ĠY"]),
        ("llama3", ["It", "'s", "Ġ", "123", "45", "Ġok", "ĊĊ", "ĠY"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "ĊĊ", "ĠY"]),
    ],
)
def test_each_kind_splits_text_in_its_own_way(pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(byte_level_fields(pre))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 ok\n\n Y")] == pieces


def test_merges_apply_in_their_order() -> None:
    words = ("ab", "bc", "abc")
    first_ab = byte_level_fields(words=words, merges=["a b", "b c", "ab c"])
    first_bc = byte_level_fields(words=words, merges=["b c", "a b"])
    assert encode(first_ab, "abc") == ["abc"]
    assert encode(first_bc, "abc") == ["a", "bc"]


@pytest.mark.parametrize(("pre", "tokens"), [("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"]), ("qwen2", ["ab", "c"])])
def test_only_llama_3_prefers_a_whole_word_to_its_merges(pre: str, tokens: list[str]) -> None:
    assert encode(byte_level_fields(pre, words=("ab", "abc"), merges=["a b"]), "abc") == tokens


@pytest.mark.parametrize(("pre", "same"), [("qwen2", True), ("gpt-2", False)])
def test_qwen_normalizes_composed_characters(pre: str, same: bool) -> None:
    tokenizer = build_tokenizer(byte_level_fields(pre))
    composed, decomposed = "\u00e9", "e\u0301"
    assert (tokenizer.encode(composed).ids == tokenizer.encode(decomposed).ids) is same


@pytest.mark.parametrize("merge", ["a x", "a bc"])
def test_a_merge_outside_the_vocabulary_is_a_value_error(merge: str) -> None:
    fields = byte_level_fields(words=("ab",), merges=[merge])
    fields["tokenizer.ggml.tokens"].remove("x")
    fields["tokenizer.ggml.token_type"].pop()
    with pytest.raises(ValueError, match=f"merge '{merge}' has a part or a result that is not in the vocabulary"):
        build_tokenizer(fields)


def test_a_token_type_list_of_another_length_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_tokenizer(byte_level_fields(token_type=[NORMAL]))


@pytest.mark.parametrize(
    ("pre", "flag", "added"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_the_beginning_of_sequence_is_added_as_the_model_or_the_file_requires(
    pre: str, flag: bool | None, added: bool
) -> None:
    flags: dict[str, Any] = {} if flag is None else {"add_bos_token": flag}
    tokenizer = build_tokenizer(byte_level_fields(pre, **flags))
    assert (tokenizer.encode("he").ids[0] == 1) is added
    assert tokenizer.encode("he", add_special_tokens=False).ids[0] != 1


def test_a_pair_of_texts_has_two_beginnings() -> None:
    tokenizer = build_tokenizer(byte_level_fields("llama-bpe"))
    assert tokenizer.encode("a", "b").tokens == ["<bos>", "a", "<bos>", "b"]


def test_a_control_token_in_a_text_is_one_token_and_is_skipped_when_decoding() -> None:
    tokenizer = build_tokenizer(byte_level_fields())
    token_ids = tokenizer.encode("a<eos>b").ids
    assert token_ids[1] == 0 and len(token_ids) == 3
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "ab"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "a<eos>b"


def test_a_user_defined_token_is_one_token_and_is_text() -> None:
    tokenizer = build_tokenizer(byte_level_fields())
    token_ids = tokenizer.encode("a<tool>b").ids
    assert len(token_ids) == 3
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "a<tool>b"


def test_tokens_without_types_are_normal_text() -> None:
    tokenizer = build_tokenizer(byte_level_fields(token_type=None))
    assert tokenizer.encode("<eos>").tokens == list("<eos>")


def eos(tokens: list[str], kinds: list[int] | None = None, **ids: int) -> list[int]:
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    return eos_token_ids({**fields, **{f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ids.items()}})


def test_the_eos_tokens_start_with_the_one_that_the_file_names() -> None:
    tokens = ["<|endoftext|>", "a", "<|im_end|>", "</s>"]
    assert eos(tokens, [CONTROL, NORMAL, CONTROL, CONTROL], eos=3) == [3, 0, 2]
    assert eos(tokens, [CONTROL, NORMAL, CONTROL, CONTROL], eos=2, eot=0, eom=3) == [2, 0, 3]


def test_text_that_looks_like_an_end_is_no_eos_token() -> None:
    assert eos(["<|endoftext|>", "a"], [NORMAL, NORMAL]) == []
    assert eos(["<|endoftext|>", "a"]) == []


SPM_WORDS = [
    *"▁aeghinst", "▁t", "he", "▁the", "th", "▁th", "in", "ing", "▁thing",
    "es", "hi", "ng", "ge", "gs", "nge", "at", "ha",
]  # fmt: skip


def sentencepiece_fields(**more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS]
    rng = np.random.default_rng(1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SPM_WORDS)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(score) for score in rng.permutation(len(SPM_WORDS))],
        "tokenizer.ggml.bos_token_id": 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def sentencepiece_by_hand(fields: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE: join the neighbours whose joint piece has the highest score, leftmost first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        joins = [(scores[ids[a + b]], -index) for index, (a, b) in pairs if a + b in ids]
        if not joins:
            break
        index = -max(joins)[1]
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
    return found


@pytest.mark.parametrize(("scores", "tokens"), [((-1.0, -2.0), ["ab", "c"]), ((-2.0, -1.0), ["a", "bc"])])
def test_the_pair_with_the_higher_score_is_joined_first(scores: tuple[float, float], tokens: list[str]) -> None:
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "▁", "a", "b", "c", "ab", "bc"],
        "tokenizer.ggml.token_type": [UNKNOWN, *[NORMAL] * 6],
        "tokenizer.ggml.scores": [0.0, *[-9.0] * 4, *scores],
    }
    assert encode(fields, "abc") == ["▁", *tokens]


def test_a_sentencepiece_tokenizer_joins_by_score() -> None:
    fields = sentencepiece_fields()
    tokenizer = build_tokenizer(fields)
    rng = np.random.default_rng(2)
    words = ["the", "thing", "things", "in", "a", "é", "hinges", "that", "ngeshia", "x9", "  s"]
    for _ in range(300):
        text = " ".join(rng.choice(words, int(rng.integers(1, 6))))
        assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece_by_hand(fields, text)
        assert tokenizer.encode(text).ids[0] == 1
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_characters_outside_a_vocabulary_with_bytes_become_bytes() -> None:
    assert encode(sentencepiece_fields(), "é")[-2:] == ["<0xC3>", "<0xA9>"]


def test_characters_outside_a_vocabulary_without_bytes_become_one_unknown_token() -> None:
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "▁", "a"],
        "tokenizer.ggml.token_type": [UNKNOWN, NORMAL, NORMAL],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    }
    assert encode(fields, "xyza") == ["▁", "<unk>", "a"]


def test_the_output_after_a_sentencepiece_prompt_keeps_its_first_space(tmp_path: Path) -> None:
    build_tokenizer(sentencepiece_fields()).save(str(tmp_path / "tokenizer.json"))
    model = load_text_model(tmp_path)
    prompt, whole = model.encode("the", True), model.encode("the thing", True)
    assert whole[: len(prompt)] == prompt
    detokenizer = model.detokenizer(True, prompt)
    assert "".join(detokenizer.feed(token) for token in whole[len(prompt) :]) + detokenizer.flush() == " thing"


def test_a_file_may_turn_off_the_space_before_a_text() -> None:
    tokenizer = build_tokenizer(sentencepiece_fields(add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("the thing", add_special_tokens=False).ids) == "the thing"
    assert tokenizer.encode("in", add_special_tokens=False).tokens == ["in"]


WRONG: dict[str, list[Any]] = {
    "tokens": [None, "ab", [1, 2], [], ["a" * 5000, "b"]],
    "token_type": ["normal", [1], [1, 1, 1], [1, "2"]],
    "scores": [None, [0.0], [0.0, float("nan")], [0.0, float("-inf")], ["0", "1"], 1.0],
    "bos_token_id": [-1, 2, 1.0, "a", True, 10**30],
    "eos_token_id": [-1, 2, [0]],
    "add_bos_token": [1, "yes"],
    "add_space_prefix": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_field_that_is_not_sound_is_refused_by_name(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"model": "llama", "tokens": ["a", "b"], "scores": [0.0, -1.0], name: value}
    named = FileFields(Path("m.gguf"), {f"tokenizer.ggml.{one}": field for one, field in fields.items()})
    with pytest.raises(ModelUnsupported, match=r"^m\.gguf: tokenizer\.ggml\.[a-z_]+: ") as caught:
        check_tokenizer(named)
    assert "\n" not in str(caught.value)
