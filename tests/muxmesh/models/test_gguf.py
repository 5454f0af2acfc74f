"""GGUF files: every architecture, quantization and tokenizer that is read computes what its origin does."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import RopeScalingType
from transformers import AutoModelForCausalLM, AutoTokenizer

from muxmesh.cli.main import main
from muxmesh.config.schema import ModelConfig
from muxmesh.errors import ConfigError, ModelUnsupported
from muxmesh.models.gguf_import import import_gguf, read_gguf
from muxmesh.models.gguf_tokenizer import build_tokenizer
from muxmesh.models.model_spec import LinearRope, Llama3Rope, YarnRope, read_model_spec
from muxmesh.models.prepared_model import prepare_model
from muxmesh.models.tokenizer import load_text_model
from tests.support.gguf_files import TinyGguf, write_gguf

BLOCK_OF_32 = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
BLOCK_OF_256 = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS]


def ignore(*progress: Any) -> None:
    pass


def same_logits(origin: Any, folder: Path) -> None:
    imported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        difference = (imported(token_ids).logits - origin(token_ids).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("kind", BLOCK_OF_32, ids=lambda kind: kind.name)
def test_quantizations(tmp_path: Path, kind: Type) -> None:
    origin = write_gguf(tmp_path / "tiny.gguf", TinyGguf(quantization=kind))
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", ignore)
    same_logits(origin, tmp_path / "folder")


@pytest.mark.parametrize("kind", BLOCK_OF_256, ids=lambda kind: kind.name)
def test_quantizations_with_large_blocks(tmp_path: Path, kind: Type) -> None:
    tiny = TinyGguf(quantization=kind, hidden=256, inner=256, heads=8, kv_heads=8, head_dim=32)
    origin = write_gguf(tmp_path / "tiny.gguf", tiny)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", ignore)
    same_logits(origin, tmp_path / "folder")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures(tmp_path: Path, architecture: str, tied: bool) -> None:
    origin = write_gguf(tmp_path / "tiny.gguf", TinyGguf(architecture=architecture, tied=tied))
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", ignore)
    same_logits(origin, tmp_path / "folder")
    assert read_model_spec(tmp_path / "folder").tied_embeddings is tied


def test_the_tokenizer_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", ignore)
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
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "ĊĊ", "ĠY"]),
    ],
)
def test_each_kind_splits_text_in_its_own_way(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", TinyGguf(pre=pre))
    tokenizer = build_tokenizer(read_gguf(tmp_path / "tiny.gguf").fields)
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 ok\n\n Y")] == pieces


def test_the_beginning_of_sequence_is_added_where_the_model_wants_it(tmp_path: Path) -> None:
    for pre, flag, expected in (("llama-bpe", None, True), ("qwen2", None, False), ("qwen2", True, True)):
        path = tmp_path / f"{pre}-{flag}.gguf"

        def more(writer: Any, flag: bool | None = flag) -> None:
            if flag is not None:
                writer.add_add_bos_token(flag)

        write_gguf(path, TinyGguf(pre=pre, more=more))
        tokenizer = build_tokenizer(read_gguf(path).fields)
        assert (tokenizer.encode("he").ids[0] == 1) is expected
        assert tokenizer.encode("he", add_special_tokens=False).ids[0] != 1


def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TinyGguf(more=lambda writer: writer.add_eot_token_id(0)))
    assert read_gguf(tmp_path / "tiny.gguf").spec.eos_token_ids == {0, 2}


SPM_WORDS = ["▁", "▁t", "he", "▁the", "th", "▁th", "in", "ing", "▁thing", "e", "n", "s", "es", "a", "t", "h", "i", "g"]


def sentencepiece_fields() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS]
    rng = np.random.default_rng(1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(SPM_WORDS)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(score) for score in rng.permutation(len(SPM_WORDS))],
        "tokenizer.ggml.bos_token_id": 1,
    }


def sentencepiece_by_hand(fields: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE: join the neighbours whose joint piece has the highest score, leftmost first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not joins:
            break
        at = -max(joins)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
    return found


def test_a_sentencepiece_tokenizer_joins_by_score() -> None:
    fields = sentencepiece_fields()
    tokenizer = build_tokenizer(fields)
    rng = np.random.default_rng(2)
    words = ["the", "thing", "things", "in", "a", "é", "hinges", "x9", "  s"]
    for _ in range(300):
        text = " ".join(rng.choice(words, int(rng.integers(1, 6))))
        assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece_by_hand(fields, text)
        assert tokenizer.encode(text).ids[0] == 1
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_answer_to_a_sentencepiece_prompt_keeps_its_first_space(tmp_path: Path) -> None:
    build_tokenizer(sentencepiece_fields()).save(str(tmp_path / "tokenizer.json"))
    model = load_text_model(tmp_path)
    prompt, whole = model.encode("the", True), model.encode("the thing", True)
    assert whole[: len(prompt)] == prompt
    detokenizer = model.detokenizer(True, prompt)
    assert "".join(detokenizer.feed(token) for token in whole[len(prompt) :]) + detokenizer.flush() == " thing"


def test_without_a_space_before_the_text() -> None:
    tokenizer = build_tokenizer({**sentencepiece_fields(), "tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.decode(tokenizer.encode("the thing", add_special_tokens=False).ids) == "the thing"
    assert tokenizer.encode("in", add_special_tokens=False).tokens == ["in"]


def test_rope_scaling(tmp_path: Path) -> None:
    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    write_gguf(tmp_path / "yarn.gguf", TinyGguf(more=yarn))
    rope = read_gguf(tmp_path / "yarn.gguf").spec.rope_scaling
    assert isinstance(rope, YarnRope) and (rope.factor, rope.original_context_len) == (4.0, 32)


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_linear_rope_scaling_of_new_and_old_files(tmp_path: Path, key: str) -> None:
    def linear(writer: Any) -> None:
        if key.endswith("factor"):
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_float32(key, 4.0)

    write_gguf(tmp_path / "linear.gguf", TinyGguf(more=linear))
    assert read_gguf(tmp_path / "linear.gguf").spec.rope_scaling == LinearRope(4.0)


def llama3_factors(factor: float) -> np.ndarray:
    """As llama.cpp computes them: wave lengths over 8192 stretched, under 2048 kept, the others in between."""
    factors = []
    for pair in range(8):
        wave = 2 * np.pi * 10_000.0 ** (pair / 8)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_the_rope_factors_of_llama_3_are_recognized(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TinyGguf(more=lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors(32.0))))
    rope = read_gguf(path).spec.rope_scaling
    assert isinstance(rope, Llama3Rope) and (rope.factor, rope.original_context_len) == (32.0, 8192)
    import_gguf(path, tmp_path / "folder", ignore)
    assert read_model_spec(tmp_path / "folder").rope_scaling == rope


@pytest.mark.parametrize(
    ("tiny", "named"),
    [
        (TinyGguf(called="mamba"), "architecture mamba is not supported; supported: llama, qwen2, qwen3"),
        (TinyGguf(pre="tekken"), "tokenizer gpt2/tekken is not supported; supported: llama, gpt2/gpt-2"),
        (TinyGguf(pre=None), "tokenizer gpt2/None is not supported"),
        (TinyGguf(merges=("h x",)), "a field contradicts another"),
        (TinyGguf(more=lambda writer: writer.add_uint16("split.count", 3)), "one of 3 parts"),
        (TinyGguf(more=lambda writer: writer.add_rope_scaling_attn_factors(2.0)), "attn_factor is 2.0, not supported"),
        (
            TinyGguf(more=lambda writer: writer.add_tensor("blk.0.ffn_up.bias", np.ones(96, dtype=np.float32))),
            "tensor blk.0.ffn_up.bias belongs to no supported llama model",
        ),
        (TinyGguf(more=lambda writer: writer.add_expert_count(8)), "mixture of experts"),
        (TinyGguf(more=lambda writer: writer.add_rope_scaling_type(RopeScalingType.LONGROPE)), "rope scaling longrope"),
        (
            TinyGguf(more=lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 3.0, dtype=np.float32))),
            "not those of Llama 3",
        ),
        (
            TinyGguf(more=lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones(8, dtype=np.float32))),
            "tensor blk.0.ffn_gate_exps.weight belongs to no supported llama model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_named(tmp_path: Path, tiny: TinyGguf, named: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny)
    with pytest.raises(ModelUnsupported, match=named):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder", ignore)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported, match=r"bad\.gguf: no GGUF file, or a damaged one"):
        read_gguf(path)


def test_a_file_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", TinyGguf(quantization=Type.Q8_0))
    model = ModelConfig(name="m", source="tiny.gguf")
    prepared = prepare_model(model, tmp_path, tmp_path / "cache", ignore)
    assert prepared.image is not None and prepared.image.is_file()
    assert prepare_model(model, tmp_path, tmp_path / "cache", ignore) == prepared
    assert main(["model", "inspect", str(tmp_path / "tiny.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown and "Q8_0" in shown
    with pytest.raises(ConfigError, match=r"'other\.gguf' does not exist"):
        prepare_model(ModelConfig(name="m", source="other.gguf"), tmp_path, tmp_path / "cache", ignore)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TinyGguf(quantization=Type.F16))
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ModelUnsupported, match=r"blk\.1\.ffn_up\.weight has values that are no numbers"):
        import_gguf(path, tmp_path / "folder", ignore)
