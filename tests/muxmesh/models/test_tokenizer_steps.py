"""The steps of a tokenizer's components."""

from tokenizers import decoders, normalizers, pre_tokenizers

from muxmesh.models.tokenizer_steps import component_steps


def test_a_missing_component_has_no_steps() -> None:
    assert list(component_steps(None)) == []


def test_a_single_step_has_its_parameters() -> None:
    (step,) = component_steps(decoders.Strip(" ", 1, 0))
    assert step == {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def test_steps_of_nested_sequences_are_in_the_order_in_which_they_are_applied() -> None:
    inner = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    outer = decoders.Sequence([decoders.Replace("a", "b"), inner, decoders.Strip(" ", 1, 0)])
    assert [step["type"] for step in component_steps(outer)] == ["Replace", "ByteFallback", "Fuse", "Strip"]
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert [step["type"] for step in component_steps(normalizer)] == ["NFC", "Lowercase"]
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    assert [step["type"] for step in component_steps(pre_tokenizer)] == ["Digits", "ByteLevel"]
