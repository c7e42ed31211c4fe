"""What is read late, and what it is then."""

from __future__ import annotations

import pytest
import torch

from raylora.model.fetching import Fetched, one_late


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_is_read_when_the_next_one_is_launched(count):
    seen = []

    def launch():
        for k in range(count):
            seen.append(f"launch {k}")
            yield k

    for k in one_late(launch()):
        seen.append(f"read {k}")
    reads = [name for k in range(1, count) for name in (f"launch {k}", f"read {k - 1}")]
    assert seen == (["launch 0", *reads, f"read {count - 1}"] if count else [])


def test_what_was_read_already_is_not_lost_to_an_error():
    def launch():
        yield 1
        yield 2
        raise RuntimeError("the third fails")

    read = []
    with pytest.raises(RuntimeError, match="third"):
        read.extend(one_late(launch()))
    assert read == [1]


def test_a_tensor_comes_in_rows_and_without_its_gradient():
    x = torch.arange(6.0, requires_grad=True)
    first, none, second = Fetched(2 * x, [2, 0, 4]).rows()
    assert not first.requires_grad
    assert first.tolist() == [0, 2]
    assert none.shape == (0,)
    assert second.tolist() == [4, 6, 8, 10]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_is_read_is_what_the_tensor_was():
    """Its memory is used again while the copy is on its way."""
    fetched = []
    for k in range(20):
        x = torch.full((2**20,), float(k), device="cuda")
        fetched.append(Fetched(x))
        x.fill_(-1)
    for k, one in enumerate(fetched):
        assert one.read().device.type == "cpu"
        assert bool((one.read() == k).all())
