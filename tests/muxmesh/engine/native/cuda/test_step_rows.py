import numpy as np
import pytest

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.step_rows import arrange, decode_buckets, pack
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec
from muxmesh.models.model_spec import KvShape
from muxmesh.types import Sampling

SHAPE = KvShape(num_layers=1, num_kv_heads=2, head_dim=16, block_size=16, dtype_bytes=4)
PLAN = AttentionPlan.of(KvLayout.of(KvGeometry(SHAPE, 4 * SHAPE.token_block_bytes)), 4, 4, (9, 0), 4)
SAMPLE = SampleSpec(Sampling(), 0)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 17, 256, 1024])
def test_every_number_of_sequences_has_a_bucket_and_no_step_is_padded_by_more_than_half(max_num_seqs: int) -> None:
    buckets = decode_buckets(max_num_seqs)
    assert buckets[-1] == max_num_seqs and list(buckets) == sorted(set(buckets))
    for before, size in zip((0, *buckets), buckets, strict=False):
        assert size <= 2 * before + 1


def test_decode_rows_come_first_and_are_padded_to_a_bucket() -> None:
    chunks = (
        Chunk(1, 14, (5, 6, 7), (3, 9), SAMPLE),
        Chunk(2, 0, (8,), (4,), SAMPLE),
        Chunk(3, 17, (9,), (6, 7), None),
        Chunk(4, 31, (10,), (1, 2), SAMPLE),
    )
    rows = arrange(chunks, (1, 2, 4), PLAN)
    assert [chunk.job_id for chunk in rows.chunks] == [2, 3, 4, 1]
    assert rows.num_decodes == 4
    arrays = {name: array.tolist() for name, array in rows.arrays.items()}
    assert arrays["token_ids"] == [8, 9, 10, 0, 5, 6, 7]
    assert arrays["positions"] == [0, 17, 31, 0, 14, 15, 16]
    assert arrays["block_ids"] == [4, 7, 2, -1, 3, 3, 9], "a padding row writes nothing"
    assert arrays["context_lens"] == [1, 18, 32, 0]
    assert arrays["tables"] == [[4, 0], [6, 7], [1, 2], [0, 0], [3, 9]]
    assert arrays["tiles"] == [[4, 3, 4, 14]]
    assert arrays["logit_rows"] == [0, 2, 6]


def test_a_scored_chunk_has_the_logits_of_all_its_rows() -> None:
    scored = Chunk(1, 0, (5, 6, 7), (3,), SAMPLE, PromptScoring((6, 7), 1))
    rows = arrange((scored,), (1,), PLAN)
    assert rows.num_decodes == 0 and rows.arrays["context_lens"].shape == (0,)
    assert rows.arrays["logit_rows"].tolist() == [0, 1, 2]


def test_more_sequences_than_the_largest_bucket_are_refused() -> None:
    chunks = [Chunk(job, 0, (8,), (job,), SAMPLE) for job in range(3)]
    with pytest.raises(ValueError, match="3 sequences with one token; the runner is for 2"):
        arrange(chunks, (1, 2), PLAN)


def test_packed_arrays_are_aligned_and_keep_their_bits() -> None:
    arrays = {
        "a": np.arange(5, dtype=np.int32),
        "b": np.array([[0.5, -2.0]]).T,
        "c": np.zeros((0, 4), dtype=np.int32),
    }
    packed, parts = pack(arrays)
    assert parts == {"a": slice(0, 5), "b": slice(16, 20), "c": slice(32, 32)}
    assert packed[parts["a"]].tolist() == [0, 1, 2, 3, 4]
    assert packed[parts["b"]].view(np.float64).tolist() == [0.5, -2.0]
