"""The dispatch: pure functions of shapes, at the shapes that matter and at those that could break them."""

import itertools

import pytest

from csrc_triton import plan

GB = 2**30
BF16 = {"itemsize": 2, "weight_itemsize": 2, "budget": 4 * GB, "tf32": False}
MODERN = {"B": 8192, "D": 4096, "M": 131072, "K": 64}
PAPER = {"B": 4096, "D": 3200, "M": 50000, "K": 1024}


def test_encode_at_the_shapes_of_the_benchmarks():
    modern = plan.encode(**MODERN, itemsize=2, budget=4 * GB)
    assert (modern.select, modern.group, modern.gemm, modern.rows) == ("groups", 128, "cublas", 8192)
    assert modern.bytes == 8192 * 131072 * 2
    paper = plan.encode(**PAPER, itemsize=2, budget=4 * GB)
    assert (paper.select, paper.group, paper.gemm) == ("groups", 16, "cublas")
    # A pass for the maxima is 24 % of the product at D = 768, 48 % at 384: worth a GEMM of our own. Not in fp32, where
    # a product takes far longer.
    small = {"B": 4096, "D": 384, "M": 32768, "K": 32}
    assert plan.encode(**{**small, "D": 768}, itemsize=2, budget=GB).gemm == "cublas"
    assert plan.encode(**small, itemsize=2, budget=GB).gemm == "triton"
    assert plan.encode(**small, itemsize=4, budget=GB).gemm == "cublas"


def test_rows_are_held_in_chunks_within_the_budget():
    chosen = plan.encode(**MODERN, itemsize=2, budget=GB)
    assert chosen.rows == 4096
    # Chunks of one size, of whole tiles: not one of 2016 rows and a tail that reads all weights for 128.
    assert plan.encode(8192, 2048, 1 << 20, 64, 2, int(4.23e9)).rows == 1664
    assert plan.encode(8192, 2048, 1 << 20, 64, 2, 700 << 20).rows == 342
    assert chosen.bytes == GB
    assert plan.encode(**MODERN, itemsize=2, budget=1).rows == 1
    assert plan.encode(0, 16, 100, 4, 2, GB).rows == 1


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_plan_can_be_launched(itemsize: int, copied: bool):
    sizes = [1, 2, 3, 15, 16, 97, 255, 1000, 4097, 50_000, 131_072, 1 << 20, (1 << 24) + 1]
    for M, K in itertools.product(sizes, [1, 2, 7, 64, 100, 1024, 2048, 2049, 5000]):
        if K > M:
            continue
        chosen = plan.encode(8192, 768, M, K, itemsize, GB, copied=copied)
        assert M <= chosen.width < M + chosen.columns
        assert chosen.columns % max(64, chosen.group) == 0
        assert chosen.width % chosen.columns == 0
        assert chosen.gemm == "triton" or not (copied or M % 64) or chosen.columns <= 16384
        assert chosen.select == "topk" if K > 2048 else chosen.select in ("groups", "stream")
        if chosen.select == "groups":
            groups = chosen.width // chosen.group
            assert chosen.width % chosen.group == 0
            # Registers of one program hold the maxima; k of them and more must be there to choose from.
            assert 3 * K <= 2 * groups <= 2 * (4096 + 64 // chosen.group)
        if chosen.gemm == "triton":
            assert itemsize == 2
            assert 128 % chosen.group == 0


def test_decode_gathers_where_codes_are_sparse_and_multiplies_where_they_are_not():
    modern = plan.decode(**MODERN, N=32, linear=True, **BF16)
    assert (modern.forward, modern.backward, modern.encoder_backward) == ("gather", "gather", "gather")
    paper = plan.decode(**PAPER, N=512, linear=True, **BF16)
    assert (paper.forward, paper.encoder_backward) == ("dense", "dense")
    assert "forward: gather 9.4 ms, dense 4 ms" in paper.reason
    plain = plan.decode(**PAPER, N=1024, linear=False, **BF16)
    assert (plain.forward, plain.backward) == ("dense", "dense")


@pytest.mark.parametrize("D", [768, 3200, 4096])
def test_the_crossover_is_where_the_formula_has_it(D: int):
    """A row costs K D b / BW gathered, and 2 M D / F + 3 M b / BW as a product, with b bytes a number."""
    B, M = 1 << 16, 1 << 17  # so many rows that reading the weights once does not count
    rate = plan.BANDWIDTH / plan.FLOPS[2]
    crossover = rate + 3 / D  # of K / M, with 2 bytes a number
    for factor, expected in ((0.9, "gather"), (1.1, "dense")):
        assert plan.decode(B, D, M, round(factor * crossover * M), 1, False, **BF16).forward == expected


def test_few_rows_are_gathered():
    """With few rows a product must read all weights for them."""
    assert plan.decode(1, 4096, 131072, 2048, 1, False, **BF16).forward == "gather"


def test_one_gather_where_both_decoders_see_the_same_code():
    assert plan.decode(**MODERN, N=64, linear=True, **BF16).shared
    assert not plan.decode(**MODERN, N=32, linear=True, **BF16).shared
    assert not plan.decode(**MODERN, N=64, linear=False, **BF16).shared
    assert not plan.decode(100, 4096, 131072, 64, 64, True, **BF16).shared, "summing the weights would cost more"


def test_the_cheapest_way_by_bytes_or_by_operations():
    by_bytes = {"a": (43 * 10**9, 0), "b": (86 * 10**9, 0)}
    assert plan.cheapest(by_bytes, 2)[0] == "a"
    by_operations = {"a": (1, 10**15), "b": (43 * 10**8, 10**12)}
    way, reason = plan.cheapest(by_operations, 2)
    assert way == "b"
    assert "b 4101 MiB, 1.3 ms" in reason


def test_groups_serve_whatever_leaves_enough_of_them():
    for M, K in ((1 << 20, 2048), (1_000_000, 2048), (500_000, 2048), (100_000, 1600), (50_000, 1600)):
        assert plan.encode(8192, 2048, M, K, 2, GB).select == "groups", (M, K)
    small = plan.encode(64, 64, 2048, 512, 2, GB)
    assert small.select == "stream"
    assert "2048 features make too few groups for k = 512" in small.reason


def test_summed_weights_stay_within_the_budget():
    shape = {**MODERN, "N": 64, "linear": True}
    assert plan.decode(**shape, **BF16).shared
    assert not plan.decode(**shape, **(BF16 | {"budget": GB - 1})).shared


def test_what_is_fast_depends_on_tf32_and_on_the_weights():
    fp32 = {"itemsize": 4, "weight_itemsize": 4, "budget": 4 * GB}
    assert plan.decode(**PAPER, N=512, linear=True, **fp32, tf32=False).forward == "gather"
    assert plan.decode(**PAPER, N=512, linear=True, **fp32, tf32=True).forward == "dense"
    # Under autocast rows of fp32 are gathered, twice the bytes, and products are narrow.
    K = 700
    assert plan.decode(8192, 4096, 131072, K, 1, False, **BF16).forward == "gather"
    assert plan.decode(8192, 4096, 131072, K, 1, False, **(BF16 | {"weight_itemsize": 4})).forward == "dense"
