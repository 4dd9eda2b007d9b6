"""Every path of the experts against the loop, in value and gradient; and the op as torch sees it."""

import pytest
import torch
from torch.library import opcheck

from gpt4lib.kernels import experts as kernel
from gpt4lib.kernels import grouped
from gpt4lib.kernels.grouped import FEW_ROWS, MANY_ROWS, times_transposed

pytest.importorskip("triton", reason="Triton has no wheels here")
PATHS = ("grouped", "triton")
# Largest error allowed, relative to the largest value. fp32: sums of up to 100 terms in another order. fp16 and
# bf16: the hidden layer and the output are each rounded once, and Triton's interpreter truncates when it stores
# bfloat16, so up to 2 units in the last place of the hidden layer add up.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(tokens, top_k, n_experts, d, f, dtype, activation="swiglu", seed=0, used=None):
    """Random input; only the first `used` experts are ever chosen. fp32 draws, rounded to dtype."""
    g = torch.Generator().manual_seed(seed)
    wide = 2 * f if activation == "swiglu" else f
    x = torch.randn(tokens, d, generator=g)
    w_in = torch.randn(n_experts, wide, d, generator=g) / d ** 0.5
    w_out = torch.randn(n_experts, d, f, generator=g) / f ** 0.5
    chosen = torch.rand(tokens, used or n_experts, generator=g).topk(top_k).indices
    gates = torch.rand(tokens, top_k, generator=g)
    return [t.to(DEVICE, dtype if t.is_floating_point() else None) for t in (x, chosen, gates.double().float(), w_in, w_out)]


def both(args, path, activation="swiglu"):
    """(ours, the loop's in fp64) on the same numbers."""
    x, chosen, gates, w_in, w_out = args
    ours = kernel.combine(kernel.experts(x, chosen, w_in, w_out, activation=activation, path=path), gates)
    exact = kernel.reference(*(t.double() if t.is_floating_point() else t for t in args), activation=activation)
    return ours, exact


def close(ours, exact, dtype, times=1):
    error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
    assert torch.isfinite(ours).all() and error < times * TOLERANCE[dtype], error.item()


SHAPES = {"typical": (50, 2, 4, 64, 48), "one token": (1, 2, 4, 64, 32), "one expert": (33, 1, 1, 32, 32),
          "ragged widths": (21, 3, 5, 40, 24), "more experts than slots": (5, 2, 40, 32, 16), "many rows": (150, 2, 3, 32, 32)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_loop(shape, dtype, path):
    close(*both(case(*shape, dtype), path), dtype)


@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
@pytest.mark.parametrize("path", ["triton", "triton_small"])
def test_every_activation(activation, path):
    close(*both(case(7, 2, 5, 32, 24, torch.float32, activation), path, activation), torch.float32)


@pytest.mark.parametrize("shape", [(1, 2, 4, 64, 32), (7, 3, 5, 40, 24), (16, 2, 40, 32, 32), (16, 1, 1, 32, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_small_batch_path_equals_the_loop(shape, dtype):
    close(*both(case(*shape, dtype), "triton_small"), dtype)


def test_the_small_batch_path_never_reads_an_expert_nobody_chose():
    x, chosen, gates, w_in, w_out = case(4, 2, 6, 32, 16, torch.float32, used=3)
    w_in[3:], w_out[3:] = float("nan"), float("nan")
    for path in ("triton_small", "triton", "grouped"):
        assert torch.isfinite(kernel.experts(x, chosen, w_in, w_out, path=path)).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_gradients_equal_those_of_the_loop(path, activation):
    dtype = torch.float32 if path == "triton" else torch.float64
    args = case(30, 2, 5, 24, 16, dtype, activation, used=4)             # expert 4 gets no token
    args[2] = args[2].to(dtype)
    leaves = [t for t in args if t.is_floating_point()]
    twins = [t.double() for t in leaves]
    for t in leaves + twins:
        t.requires_grad_()
    x, gates, w_in, w_out = leaves
    ours = kernel.combine(kernel.experts(x, args[1], w_in, w_out, activation=activation, path=path), gates)
    exact = kernel.reference(twins[0], args[1], *twins[1:], activation=activation)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(exact.square().sum(), twins)):
        close(a, b, dtype)


@pytest.mark.parametrize("path", [*PATHS, "triton_small"])
def test_all_tokens_on_one_pair_of_experts(path):
    close(*both(case(16, 2, 6, 32, 24, torch.float32, used=2), path), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["triton", "triton_small"])
def test_gradients_in_half_precision(path, dtype):
    """Twice the tolerance of the output: forward and backward each round the hidden layer."""
    args = case(12, 2, 4, 32, 16, dtype)
    args[2] = args[2].to(dtype)
    leaves = [t for t in args if t.is_floating_point()]
    twins = [t.double() for t in leaves]
    for t in leaves + twins:
        t.requires_grad_()
    ours = kernel.combine(kernel.experts(leaves[0], args[1], *leaves[2:], path=path), leaves[1])
    exact = kernel.reference(twins[0], args[1], *twins[1:])
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), twins)):
        close(a, b, dtype, times=2)


def test_gradients_of_biases():
    x, chosen, gates, w_in, w_out = case(9, 2, 4, 8, 6, torch.float64)
    biases = torch.randn(4, 12, dtype=torch.float64, device=DEVICE), torch.randn(4, 8, dtype=torch.float64, device=DEVICE)
    args = [t.requires_grad_() for t in (x, w_in, w_out, *biases)]
    assert torch.autograd.gradcheck(lambda x, *w: kernel.experts(x, chosen, *w), args)


@pytest.mark.parametrize("path", PATHS)
def test_dropped_slots_are_zero_and_give_no_gradient(path):
    """grouped_mm leaves rows past the last offset uninitialised; nothing of that may be seen."""
    x, chosen, _, w_in, w_out = case(20, 2, 4, 16, 16, torch.float32)
    chosen = kernel.within_capacity(chosen, 4, 3)
    x.requires_grad_(), w_in.requires_grad_()
    slots = kernel.experts(x, chosen, w_in, w_out, path=path)
    gone = (chosen == 4).flatten()
    assert gone.sum() == 28 and not slots[gone].any() and torch.isfinite(slots).all()
    slots[gone].sum().backward()
    assert not x.grad.any() and not w_in.grad.any()


def test_the_same_input_gives_the_same_bits():
    args = case(64, 4, 8, 32, 16, torch.float32)
    assert torch.equal(both(args, "triton")[0], both(args, "triton")[0])
    assert torch.equal(both(args, "grouped")[0], both(args, "grouped")[0])


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("width", [6, 7])
def test_few_rows_are_multiplied_the_other_way_round_with_the_same_result(rows, width):
    x, w = torch.randn(rows, 5, dtype=torch.float64), torch.randn(width, 5, dtype=torch.float64)
    out = torch.empty(rows, width, dtype=torch.float64)
    times_transposed(x, w, out)
    torch.testing.assert_close(out, x @ w.t(), rtol=1e-14, atol=1e-14)


def test_rows_past_the_last_run_come_out_zero_where_grouped_mm_leaves_them_unwritten():
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, weight = torch.randn(7, 8), torch.randn(3, 12, 8)
    out = grouped._all_rows(rows, weight, ends)
    assert not out[5:].any() and torch.allclose(out[:2], rows[:2] @ weight[0].t(), atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
def test_all_experts_at_once_and_one_at_a_time_agree(activation, biases, monkeypatch):
    """An expert nobody chose, a dropped slot: outputs and every gradient, to fp32 rounding of sums of 16 to 40 terms."""
    torch.manual_seed(0)
    x, chosen = torch.randn(40, 16), torch.randint(1, 4, (40, 1)).repeat(1, 2)
    chosen[:, 1], chosen[3, 0] = 5, 6                                            # 6 experts: the slot is dropped
    w_in, w_out = torch.randn(6, 32, 16), torch.randn(6, 16, 16 if activation == "swiglu" else 32)
    bias = (torch.randn(6, 32), torch.randn(6, 16)) if biases else (None, None)
    leaves = [t for t in (x, w_in, w_out, *bias) if t is not None]
    grad, results = torch.randn(80, 16), []
    for reason in (None, "a test asks for it"):
        monkeypatch.setattr(grouped, "why_by_expert", lambda *_: reason)
        out = kernel.experts(x.requires_grad_(), chosen, w_in.requires_grad_(), w_out.requires_grad_(),
                             *(b if b is None else b.requires_grad_() for b in bias), activation=activation)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert not results[0][2][0].any() and not results[0][0][6].any()
    for at_once, one_at_a_time in zip(*results):
        torch.testing.assert_close(at_once, one_at_a_time, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows, dtype, words", [
    (FEW_ROWS, torch.float32, "few enough"), (MANY_ROWS + 1, torch.float32, "too many"), (64, torch.float64, "float64"),
    (64, torch.bfloat16, "bfloat16")])
def test_why_experts_run_one_at_a_time_on_a_cpu(rows, dtype, words):
    x, w_in, w_out = (torch.empty(s, dtype=dtype) for s in ((rows * 4, 16), (4, 32, 16), (4, 16, 16)))
    assert words in grouped.why_by_expert(x, rows * 4, w_in, w_out)
    assert grouped.why_by_expert(x.float(), 64 * 4, w_in.float(), w_out.float()) is None
    assert "16 bytes" in grouped.why_by_expert(x.float()[:, 1:], 64 * 4, w_in.float()[..., :15].contiguous(), w_out.float())


def test_tile_map_covers_every_run_once_within_its_bound():
    from gpt4lib.kernels.experts_triton import tile_map
    for counts in ([5, 0, 17, 1], [0, 0, 0, 64], [16, 16, 16, 16], [0, 0, 0, 0]):
        ends = torch.tensor(counts).cumsum(0).int()
        expert, start = tile_map(ends, 64, 16)
        seen = [(e, r) for e, s in zip(expert.tolist(), start.tolist()) if e >= 0 for r in range(s, min(s + 16, int(ends[e])))]
        assert seen == [(e, r) for e in range(4) for r in range(int(ends[e]) - counts[e], int(ends[e]))]
        assert len(expert) == 64 // 16 + 4


# --- the op ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("biases", [False, True])
def test_opcheck(biases):
    x, chosen, _, w_in, w_out = case(9, 2, 4, 16, 8, torch.float64)
    bias = [torch.randn(4, 16, dtype=torch.float64, device=DEVICE) for _ in range(2)] if biases else [None, None]
    leaves = [t.requires_grad_() for t in (x, w_in, w_out)]
    opcheck(torch.ops.gpt4lib.experts.default, (x, chosen, *leaves[1:], *bias, "swiglu", "grouped", True))
    opcheck(torch.ops.gpt4lib.experts.default, (x.detach(), chosen, *(t.detach() for t in leaves[1:]), *bias, "swiglu", "grouped", False))


@pytest.mark.parametrize("biases", [False, True])
def test_opcheck_of_the_backward_pass(biases):
    x, chosen, _, w_in, w_out = case(9, 2, 4, 16, 8, torch.float64)
    args = (torch.randn_like(x.repeat(2, 1)), x, chosen, w_in, w_out, torch.randn(18, 16, dtype=x.dtype, device=x.device), "swiglu", biases)
    opcheck(torch.ops.gpt4lib.experts_backward.default, args, test_utils=("test_schema", "test_faketensor"))


def test_no_token_at_all_has_an_empty_result_and_zero_gradients():
    """What a rank gets whose experts nobody chose: its backward pass runs all the same."""
    x, chosen, gates, w_in, w_out = (t.requires_grad_() if t.is_floating_point() else t for t in case(0, 2, 4, 16, 8, torch.float32))
    out = kernel.combine(kernel.experts(x, chosen, w_in, w_out), gates)
    out.sum().backward()
    assert out.shape == (0, 16) and x.grad.shape == (0, 16) and not w_in.grad.any() and not w_out.grad.any()


def test_fake_tensors_know_the_shape():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        out = kernel.experts(torch.empty(6, 8), torch.zeros(6, 2, dtype=torch.long), torch.empty(4, 12, 8), torch.empty(4, 8, 6))
        assert out.shape == (12, 8)


def test_the_choice_and_its_reason_can_be_asked_for():
    x, chosen, _, w_in, w_out = case(9, 2, 4, 16, 8, torch.float32)
    if DEVICE == "cpu":
        path, reason = kernel.choose(x, chosen, w_in, w_out)
        assert path == "grouped" and "on cpu" in reason and grouped.why_by_expert(x, 18, w_in, w_out) in reason
    assert kernel.choose(x.double(), chosen, w_in, w_out)[0] == "grouped"


@pytest.mark.parametrize("change, words", [
    (dict(path="fast"), "path='fast' is not known; accepted: None, grouped"), (dict(activation="relu"), "activation='relu'"),
    (dict(x=torch.zeros(17, 16), chosen=torch.zeros(17, 2, dtype=torch.long), path="triton_small"), "at most 16 tokens"),
    (dict(w_out=torch.zeros(4, 16, 9)), r"w_out must be \(4, 16, 8\)"), (dict(x=torch.zeros(8, 16)), "one row per choice"),
    (dict(b_out=torch.zeros(4, 16)), "give both"), (dict(b_in=torch.zeros(4, 15), b_out=torch.zeros(4, 16)), "do not fit"),
    (dict(x=torch.zeros(9, 16, dtype=torch.float64)), "the same dtype"),
    (dict(**{n: torch.zeros(s, dtype=torch.float64) for n, s in (("x", (9, 16)), ("w_in", (4, 16, 16)), ("w_out", (4, 16, 8)))},
          path="triton"), "path='triton' cannot run")])
def test_what_does_not_fit_is_refused_in_one_line(change, words):
    x, chosen, _, w_in, w_out = (t.cpu() for t in case(9, 2, 4, 16, 8, torch.float32))
    args = dict(x=x, chosen=chosen, w_in=w_in, w_out=w_out) | change
    with pytest.raises(ValueError, match=words) as error:
        kernel.experts(**args)
    assert "\n" not in str(error.value)
