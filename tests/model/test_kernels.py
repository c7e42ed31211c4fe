"""Each kernel beside the plain code: on a GPU where there is one, else in Triton's interpreter (``conftest.py``)."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit as theirs
from bitsandbytes.functional import quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.model import kernels
from raylora.model.kernel_inputs import Dropout
from raylora.model.kernels import KERNELS, Kernel, fault_of, holds, kept, scramble, signed, spread_numbers

pytest.importorskip("triton")
from raylora.model import triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
dtypes = st.sampled_from(DTYPES)


def hashes(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return scramble(spread_numbers(num_rows)).to(DEVICE), scramble(spread_numbers((width + 1) // 2)).to(DEVICE)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """None of them is 0, so that a 0 is a dropped one."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() < 0.1, 0.1, x).to(DEVICE)


def test_the_mask_is_the_one_of_every_version():
    """Stored adapters were trained with it: the hash is that of raylora before there were kernels."""
    seed, module = 123456789012345 >> 32, -1551252646
    rows = torch.cat([spread_numbers(7) + signed(seed), spread_numbers(5)])
    keep = kept(scramble(rows), scramble(spread_numbers(17)), module, torch.full((12,), 6554, dtype=torch.int32), 33)
    found = hashlib.sha256(keep.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert found == "6efd95142024a307576608cd67d842c38bae768c553d193eebc19de917bca997"


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; in bfloat16 within one rounding where Triton's interpreter made it, which cuts bits off."""
    assert found.dtype == expected.dtype
    cut = expected.dtype == torch.bfloat16 and DEVICE.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps if cut else 0, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 2100),
    module=st.integers(-(2**31), 2**31 - 1),
    thresholds=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=4),
    dtype=dtypes,
    wanted=dtypes,
    seed=st.integers(0, 99),
)
def test_dropout_keeps_what_the_plain_code_keeps(width, module, thresholds, dtype, wanted, seed):
    count = len(thresholds)
    x, limits = numbers(count, width, seed=seed).to(dtype), torch.tensor(thresholds, dtype=torch.int32, device=DEVICE)
    given_ = Dropout(*hashes(count, width), module, limits, torch.ones(count, device=DEVICE))
    keep = kept(*given_[:4], width)
    assert_same(triton_kernels.drop(x, given_, wanted), torch.where(keep, x, 0).to(wanted))
    sums = numbers(count, width, seed=seed + 1).to(wanted)
    expected = sums.float() + torch.where(keep, x, 0).float()
    triton_kernels.add_dropped(sums, x, given_)
    assert_same(sums, expected.to(wanted))


@pytest.mark.parametrize("width", [1, 64, 1023, 1024, 1025])
def test_each_row_has_its_own_share_and_factor(width):
    x = torch.ones(3, width, device=DEVICE)
    shares = torch.tensor([0.0, 0.25, 0.5], device=DEVICE)
    thresholds, factors = (shares * 2**16).int(), 1 / (1 - shares)
    y = triton_kernels.drop(x, Dropout(*hashes(3, width), 7, thresholds, factors), torch.float32)
    assert torch.equal(y[0], x[0])
    for row in (1, 2):
        assert set(y[row].tolist()) <= {0.0, float(factors[row])}
        if width > 1000:
            assert float((y[row] == 0).float().mean()) == pytest.approx(float(shares[row]), abs=0.05)


def test_dropout_of_rows_that_are_no_neighbours_in_memory():
    x = numbers(64, 6).t()
    thresholds = torch.full((6,), 6554, dtype=torch.int32, device=DEVICE)
    given_ = Dropout(*hashes(6, 64), 3, thresholds, torch.ones(6, device=DEVICE))
    assert torch.equal(triton_kernels.drop(x, given_, x.dtype), triton_kernels.drop(x.contiguous(), given_, x.dtype))
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.add_dropped(x, x.contiguous(), given_)


def test_the_public_functions_run_the_plain_code_on_a_cpu():
    x, thresholds, factors = torch.ones(2, 9), torch.tensor([0, 2**15], dtype=torch.int32), torch.tensor([1.0, 2.0])
    rows, columns = scramble(spread_numbers(2)), scramble(spread_numbers(5))
    keep = kept(rows, columns, 11, thresholds, 9)
    assert bool(keep[0].all())
    assert 0 < int(keep[1].sum()) < 9
    given_ = Dropout(rows, columns, 11, thresholds, factors)
    y = kernels.drop(x, given_, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), keep * factors[:, None])
    kernels.add_dropped(y, x, given_)
    assert torch.equal(y.float(), 2 * keep * factors[:, None])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 1100), dtypes, st.floats(1e-4, 1e3), st.integers(0, 99))
def test_int8_weights_become_the_same_floats(rows, width, dtype, scale, seed):
    random = torch.Generator().manual_seed(seed)
    integers = torch.randint(-127, 128, (rows, width), generator=random, dtype=torch.int8)
    scales = torch.rand(rows, generator=random) * scale
    expected = (integers.float() * (scales / 127)[:, None]).to(dtype)
    assert_same(triton_kernels.dequantize_int8(integers.to(DEVICE), scales.to(DEVICE), dtype).cpu(), expected)
    assert torch.equal(kernels.dequantize_int8(integers, scales, dtype), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), dtypes, st.sampled_from(["nf4", "fp4"]), st.sampled_from([64, 128]))
def test_4_bit_weights_are_those_of_bitsandbytes(rows, blocks, dtype, kind, blocksize):
    weight = numbers(rows, blocks * blocksize) * 0.02
    packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type=kind)
    exact = theirs(packed, state)
    assert torch.equal(triton_kernels.dequantize_4bit(packed, state, torch.float32), exact)
    assert_same(triton_kernels.dequantize_4bit(packed, state, dtype), exact.to(dtype))
    assert torch.equal(kernels.dequantize_4bit(packed, state, dtype), exact.to(dtype))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 90), st.integers(2, 45))
def test_4_bit_rows_need_not_end_with_a_block(rows, width):
    """bitsandbytes' own code for a CPU takes the scale of another block in such a row; no model has them."""
    weight = numbers(rows, width)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    found = triton_kernels.dequantize_4bit(packed, state, torch.float32)
    # Half of the widest gap of nf4's code is 0.14 of a block's largest number, whose scale is off by some percent.
    largest = [block.abs().max().expand(len(block)) for block in weight.reshape(-1).split(64)]
    assert bool(((found - weight).reshape(-1).abs() <= 0.2 * torch.cat(largest)).all())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 2100), dtypes, st.booleans(), st.integers(0, 99))
def test_rows_are_scaled_to_the_largest_number_of_fp8(rows, width, dtype, with_factors, seed):
    x = numbers(rows, width, seed=seed).to(dtype)
    x[-1] *= 0.001
    factors = numbers(width, seed=seed + 1).abs() if with_factors else None
    # As float32: Triton's interpreter rounds to fp8 wrongly where the rounding carries into the exponent.
    found, scales = triton_kernels.quantize_rows(x, factors, torch.float32)
    numbers_ = x.float() * (1 if factors is None else factors)
    torch.testing.assert_close(found.abs().amax(1), torch.full((rows,), 448.0, device=DEVICE))
    torch.testing.assert_close(found * scales[:, None], numbers_, rtol=1e-6, atol=0)
    plain, plain_scales = kernels.quantize_rows(x, factors)
    torch.testing.assert_close(plain_scales, scales)
    torch.testing.assert_close(plain.float(), found, rtol=2**-4, atol=2**-10)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 2100), dtypes, st.sampled_from([0.05, 0.1, 1.0]), st.floats(1e-6, 1e3),
    st.integers(0, 99),
)  # fmt: skip
def test_the_share_near_zero_is_counted_as_in_double_precision(rows, width, dtype, below, scale, seed):
    x = (numbers(rows, width, seed=seed) * scale).to(dtype)
    x[-1, ::2] *= 0.01
    exact = x.double()
    distance = exact.abs() - below * exact.square().mean(1, keepdim=True).sqrt()
    expected = (distance < 0).double().mean(1).float()
    # A number that lies on the limit but for float32's rounding may fall on either side.
    doubtful = (distance.abs() <= 1e-5 * exact.abs()).double().mean(1).float()
    for found in (triton_kernels.near_zero_share(x, below), kernels.near_zero_share(x, below)):
        assert (found.dtype, found.shape) == (torch.float32, (rows,))
        assert bool(((found - expected).abs() <= doubtful + 1e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_near_zero_that_are_known(dtype):
    x = torch.ones(6, 1500, device=DEVICE, dtype=dtype)
    x[1, :300] = 0.05
    x[2] = 0
    x[3, 7], x[4, 7] = torch.nan, torch.inf
    x[5] = 60000  # its square is beyond float16
    expected = torch.tensor([0.0, 0.2, 0.0, 0.0, 1499 / 1500, 0.0], device=DEVICE)
    for found in (triton_kernels.near_zero_share, kernels.near_zero_share):
        torch.testing.assert_close(found(x, 0.1), expected)
        torch.testing.assert_close(found(x.t().contiguous().t(), 0.1), expected)
        assert found(x[:0], 0.1).shape == (0,)
    assert bool((x[0] == 1).all()), "the numbers stay as they are"


def test_a_row_of_zeros_and_no_rows_stay_what_they_are():
    plain, scales = kernels.quantize_rows(torch.zeros(2, 16))
    assert not plain.float().any()
    assert bool((scales > 0).all())
    assert not triton_kernels.quantize_rows(torch.zeros(2, 16, device=DEVICE), None, torch.float32)[0].any()
    assert kernels.quantize_rows(torch.zeros(0, 16))[0].shape == (0, 16)
    assert triton_kernels.quantize_rows(torch.zeros(0, 16, device=DEVICE), None, torch.float32)[0].shape == (0, 16)
    thresholds = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    given_ = Dropout(*hashes(0, 16), 3, thresholds, torch.ones(0, device=DEVICE))
    assert triton_kernels.drop(torch.zeros(0, 16, device=DEVICE), given_, torch.float32).shape == (0, 16)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"quantize_rows"}))
def test_a_kernel_that_computes_the_same_is_found_to_do_so(name):
    assert fault_of(BY_NAME[name], DEVICE) == ""


def wrong_by_one_hash(x: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    return triton_kernels.drop(x, Dropout(dropout.rows + 1, *dropout[1:]), dtype)


def one_row_late(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return triton_kernels.dequantize_int8(integers, scales.roll(1), dtype)


def of_half_the_row(x: torch.Tensor, below: float) -> torch.Tensor:
    return triton_kernels.near_zero_share(x[:, ::2], below)


def of_another_type(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return triton_kernels.drop(x, *rest).double()


def does_not_compile(x: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    return triton_kernels.drop(x, Dropout(None, *dropout[1:]), dtype)


@pytest.mark.parametrize(
    ("name", "launch", "says"),
    [
        ("drop", wrong_by_one_hash, "its results differ"),
        ("dequantize_int8", one_row_late, "its results differ"),
        ("drop", of_another_type, "its results differ"),
        ("near_zero_share", of_half_the_row, "its results differ"),
        ("drop", does_not_compile, "."),
    ],
)
def test_a_wrong_kernel_is_refused(name, launch, says):
    right = BY_NAME[name]
    wrong = Kernel("wrong", launch, right.plain, right.trials)
    found = fault_of(wrong, DEVICE)
    assert says in found or says == "."
    assert found
    assert "\n" not in found


def test_no_kernel_runs_on_a_cpu():
    assert not any(holds(kernel, torch.device("cpu")) for kernel in KERNELS)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_a_refused_kernel_leaves_a_line_and_the_plain_code(caplog):
    right = BY_NAME["drop"]
    wrong = Kernel("wrong", wrong_by_one_hash, right.plain, right.trials)
    first = next(iter(right.trials(DEVICE)))
    assert torch.equal(wrong(*first), right.plain(*first))
    assert torch.equal(wrong(*first), right.plain(*first))
    assert caplog.text.count("the kernel wrong is not used on") == 1
    for kernel in KERNELS[:-1]:
        assert holds(kernel, DEVICE)
