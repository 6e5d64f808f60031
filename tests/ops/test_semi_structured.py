import pytest
import torch
from oracles import gaussian

from optimum_eggs.masks import topn_mask
from optimum_eggs.ops import choose, force
from optimum_eggs.ops.semi_structured import fits, semi_structured
from optimum_eggs.packing import pack
from optimum_eggs.pattern import NMPattern

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def packed(rows, columns, dtype=torch.bfloat16, seed=0):
    weight = gaussian(rows, columns, seed=seed, dtype=dtype)
    mask = topn_mask(gaussian(rows, columns, seed=seed + 1), NMPattern(2, 4))
    return weight * mask, *pack(weight, mask, NMPattern(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_what_torch_makes_of_the_dense_weight_and_shares_the_values(dtype):
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    dense, values, meta = packed(64, 128, dtype)
    found = semi_structured(values, meta)
    assert isinstance(found, SparseSemiStructuredTensorCUTLASS)
    assert found.packed.data_ptr() == values.data_ptr()
    torchs_values, torchs_meta = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(found.packed, torchs_values)
    assert torch.equal(found.meta, torchs_meta)
    assert torch.equal(found.to_dense(), dense)


def test_the_bits_are_reordered_once_and_again_when_they_change():
    dense, values, meta = packed(64, 128)
    first = semi_structured(values, meta)
    assert semi_structured(values, meta).meta is first.meta
    other, values, bits = packed(64, 128, seed=5)
    meta.copy_(bits)
    assert torch.equal(semi_structured(values, meta).to_dense(), other)
    assert not torch.equal(other, dense)


def test_what_fits():
    _, values, _ = packed(64, 128)
    assert fits(values, 2, 4)
    assert not fits(values, 4, 8)
    assert not fits(values.float(), 2, 4)
    assert not fits(packed(40, 128)[1], 2, 4)
    assert not fits(packed(64, 96)[1], 2, 4)


def test_it_runs_on_a_gpu_when_asked_for_and_not_otherwise():
    gpu = torch.device("cuda")
    assert choose(torch.bfloat16, gpu, 64).backend == "dense"
    with force("semi_structured"):
        assert choose(torch.bfloat16, gpu, 64).backend == "semi_structured"
        assert choose(torch.bfloat16, torch.device("cpu"), 64).backend == "reference"
