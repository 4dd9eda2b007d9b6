"""Paged decoding: the Triton kernels under the interpreter and the CPU path against the plain definition."""

import pytest
import torch
from torch.library import opcheck

from gpt4lib.kernels import decode as kernel

pytest.importorskip("triton", reason="Triton has no wheels here")
# Absolute, on outputs that average values of N(0, 1). fp32: another order of sums. fp16: one rounding of the
# weights and one of the output; bf16: the same with 8 bits, truncated by the interpreter's store.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(lengths, heads=8, n_kv=1, queries=1, width=32, page=16, dtype=torch.float32, seed=0):
    """Pages in random order, more of them than needed; unused rows hold NaN, which must never be read."""
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // page) for n in lengths]
    pages = sum(need) + 2
    k, v = (torch.full((pages, page, n_kv, width), float("nan")) for _ in range(2))
    table, free = torch.zeros(len(lengths), max(*need, 1), dtype=torch.int32), torch.randperm(pages, generator=g).tolist()
    for b, n in enumerate(lengths):
        for i in range(need[b]):
            table[b, i] = p = free.pop()
            rows = min(page, n - i * page)
            k[p, :rows], v[p, :rows] = (torch.randn(rows, n_kv, width, generator=g) for _ in range(2))
    q = torch.randn(len(lengths), heads, queries, width, generator=g)
    return [t.to(DEVICE, dtype) for t in (q, k, v)] + [table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)]


def check(args, window=None, chunk=64, path="triton"):
    exact = kernel.by_sequence(*(t.double() if t.is_floating_point() else t for t in args), window)
    out = kernel.paged_attention(*args, window=window, path=path, chunk=chunk)
    assert torch.isfinite(out).all() and (out.double() - exact).abs().max() < TOLERANCE[args[0].dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, n_kv", [(8, 1), (8, 2), (4, 4)], ids=["multi-query", "grouped", "multi-head"])
def test_ragged_lengths_and_permuted_pages(dtype, heads, n_kv):
    check(case([1, 17, 300, 64], heads, n_kv, dtype=dtype))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192],
                         ids=lambda n: f"{n} keys, page 16, chunk 64")
def test_lengths_around_page_and_chunk_boundaries(length):
    check(case([length]))


@pytest.mark.parametrize("page", [1, 5, 256])
def test_any_page_size(page):
    check(case([3, 100, 257], page=page))


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_widths(width):
    check(case([70, 5], heads=2, width=width))


@pytest.mark.parametrize("heads", [3, 6, 12, 84])
def test_groups_that_are_no_power_of_two(heads):
    check(case([70, 129], heads=heads))


@pytest.mark.parametrize("queries", [2, 5, 16])
@pytest.mark.parametrize("window", [None, 20])
def test_several_queries_see_a_causal_tail(queries, window):
    """Speculative verification uses the same kernel: query i of the last `queries` sees i more keys than the first."""
    check(case([queries, 64 + queries, 130], heads=6, n_kv=2, queries=queries), window)


@pytest.mark.parametrize("window", [1, 7, 64, 100, 1000])
def test_a_window_skips_what_it_hides(window):
    check(case([1, 90, 300]), window)


def test_an_empty_seat_gives_zeros_and_disturbs_nobody():
    args = case([0, 90, 0])
    check(args)
    assert not kernel.paged_attention(*args, path="triton", chunk=64)[[0, 2]].any()


def test_a_split_that_sees_nothing_is_no_nan():
    """With a window of 8 the first chunk of 64 keys holds no visible key for any query."""
    check(case([200, 3]), window=8)


@pytest.mark.parametrize("n_kv, queries, dtype, chunk", [
    (1, 1, torch.float32, 64), (4, 1, torch.float32, 64), (1, 3, torch.bfloat16, 64), (2, 1, torch.float16, kernel.CHUNK)], ids=str)
def test_a_sequence_s_bits_do_not_depend_on_its_batch_mates(n_kv, queries, dtype, chunk):
    lengths = [5, 64, 300, 130] if chunk == 64 else [5, 1100]
    q, k, v, table, n = case(lengths, heads=8, n_kv=n_kv, queries=queries, dtype=dtype)
    together = kernel.paged_attention(q, k, v, table, n, path="triton", chunk=chunk)
    for b, length in enumerate(lengths):
        own = table[b:b + 1, :-(-length // 16)]                    # alone, with a table of its own length
        alone = kernel.paged_attention(q[b:b + 1], k, v, own, n[b:b + 1], path="triton", chunk=chunk)
        assert torch.equal(alone[0], together[b])


def test_the_cpu_path_equals_the_definition():
    for dtype in (torch.float64, torch.float32):
        check(case([1, 17, 130], heads=6, n_kv=2, queries=1, dtype=dtype), path="folded")
        check(case([3, 17, 130], heads=6, n_kv=2, queries=3, dtype=dtype), window=9, path="folded")


def test_pages_are_read_in_the_order_of_the_table():
    """Against contiguous keys that never saw a page: what both paths and their oracle might get wrong together."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 8, generator=g, dtype=torch.float64).to(DEVICE) for h, n in ((4, 1), (2, 11), (2, 11)))
    table, pages = torch.tensor([[2, 0, 3]], dtype=torch.int32, device=DEVICE), torch.full((2, 4, 4, 2, 8), float("nan"), device=DEVICE).double()
    for i, page in enumerate(table[0].tolist()):
        for pool, t in zip(pages, (k, v)):
            rows = t[0].transpose(0, 1)[4 * i:4 * i + 4]
            pool[page, :len(rows)] = rows
    n = torch.tensor([11], dtype=torch.int32, device=DEVICE)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(kernel.paged_attention(q, *pages, table, n, path="folded"), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(kernel.paged_attention(q.float(), *pages.float(), table, n, path="triton"), expected.float(), rtol=0, atol=2e-6)


def test_offsets_beyond_31_bits():
    """Three heads 2^30 elements apart: a virtual allocation of which some kilobytes are ever touched."""
    far = 2 ** 30
    k, v = (torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE).as_strided((1, 4, 3, 16), (64, 16, far, 1)) for _ in "kv")
    g = torch.Generator().manual_seed(0)
    for pages in (k, v):
        pages.copy_(torch.randn(1, 4, 3, 16, generator=g))
    q = torch.randn(1, 3, 1, 16, generator=g).to(DEVICE, torch.float16)
    check([q, k, v, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.tensor([4], dtype=torch.int32, device=DEVICE)])


def test_a_transposed_table_and_strided_lengths_are_read_as_what_they_say():
    q, k, v, table, n = case([70, 33, 129])
    expected = kernel.paged_attention(q, k, v, table, n, path="triton", chunk=64)
    strided = torch.stack([n, torch.zeros_like(n)], 1)[:, 0]
    found = kernel.paged_attention(q, k, v, table.t().contiguous().t(), strided, path="triton", chunk=64)
    assert torch.equal(found, expected)


def test_a_contiguous_cache_is_one_page_a_sequence():
    """Strides, not copies: [batch, heads, tokens, width] seen as pages gives the attention of the whole."""
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(2, 4, 1, 16, generator=g).to(DEVICE), *torch.randn(2, 2, 2, 50, 16, generator=g).to(DEVICE).unbind(0)
    table, n = torch.arange(2, dtype=torch.int32, device=DEVICE)[:, None], torch.tensor([37, 37], dtype=torch.int32, device=DEVICE)
    k, v = k[:, :, :37], v[:, :, :37]                              # a view into a larger buffer
    out = kernel.paged_attention(q, k.transpose(1, 2), v.transpose(1, 2), table, n, path="triton")
    from gpt4lib.kernels.attention import attention
    torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=2e-6)


def test_opcheck():
    args = case([3, 17])
    opcheck(torch.ops.gpt4lib.paged_attention.default, (*args, 0, "folded", 64), test_utils=("test_schema", "test_faketensor"))
    turned = args[0].transpose(1, 2).contiguous().transpose(1, 2)                 # as a projection leaves its heads
    opcheck(torch.ops.gpt4lib.paged_attention.default, (turned, *args[1:], 0, "folded", 64), test_utils=("test_schema", "test_faketensor"))


def test_the_choice_and_its_reason_can_be_asked_for():
    q, k, *_ = case([3])
    if DEVICE == "cpu":
        path, reason = kernel.choose(q, k)
        assert path == "folded" and "on cpu" in reason


@pytest.mark.parametrize("change, words", [
    ({0: torch.zeros(1, 8, 1, 31)}, "do not fit"), ({3: torch.zeros(2, 1, dtype=torch.int32)}, "do not fit"),
    ({0: torch.zeros(1, 9, 1, 32), 1: torch.zeros(4, 16, 2, 32)}, "n_heads=9 is not divisible by n_kv_heads=2"),
    ({0: torch.zeros(1, 8, 1, 32, dtype=torch.float64)}, "give all three the same dtype")])
def test_what_does_not_fit_is_refused_in_one_line(change, words):
    args = [t.cpu() for t in case([3])]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=words) as error:
        kernel.paged_attention(*args, path="triton")
    assert "\n" not in str(error.value)
