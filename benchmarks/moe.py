"""One Mixtral-shaped mixture layer against transformers' two implementations and a dense layer of the same FLOP.

    python benchmarks/moe.py          writes results/moe_cpu.json, or results/moe_cuda.json where there is a GPU

On a CPU the layer is a quarter of Mixtral's width and height, in fp32; on a GPU it is Mixtral's own, in bfloat16.
"""

from __future__ import annotations

import sys

import limits
import runner
import torch
from limits import CUDA

from gpt4lib import ModelSpec, roofline
from gpt4lib.kernels import experts as kernel
from gpt4lib.nn.moe import FeedForward, MoE

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
MIXTRAL = ModelSpec.preset("mixtral-8x7b")
SPEC = MIXTRAL if CUDA else MIXTRAL.with_(d_model=1024, d_ff=3584, d_expert=3584)
BATCHES = (1, 4, 16, 64, 256, 2048, 8192) if CUDA else (1, 4, 16, 64, 256, 2048)


def layers() -> dict[str, torch.nn.Module]:
    """The same weights behind four interfaces: ours, theirs twice, and a dense layer as wide as top_k experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    torch.manual_seed(0)
    ours = MoE(SPEC)
    config = dict(hidden_size=SPEC.d_model, intermediate_size=SPEC.d_expert, num_local_experts=SPEC.n_experts,
                  num_experts_per_tok=SPEC.top_k)
    out = {"gpt4lib": ours}
    for name in ("grouped_mm", "eager"):
        layer = MixtralSparseMoeBlock(MixtralConfig(**config, experts_implementation=name))
        layer.gate.weight.data = ours.router.weight.data
        layer.experts.gate_up_proj.data, layer.experts.down_proj.data = ours.experts.w_in.data, ours.experts.w_out.data
        out[f"transformers {name}"] = layer
    out["dense"] = FeedForward(SPEC.d_model, SPEC.top_k * SPEC.d_expert, gated=True, bias=False)
    return {name: layer.to(DEVICE, DTYPE) for name, layer in out.items()}


def call(layer, x: torch.Tensor, backward: bool):
    """One forward, or forward and backward, of [tokens, d_model]; theirs wants a batch dimension."""
    theirs = "Mixtral" in type(layer).__name__
    x = x[None] if theirs else x
    grad = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x.detach().requires_grad_()).backward(grad)
    return limits.waited(both if backward else forward)


def least_seconds(tokens: int, touched: int, backward: bool, limit: dict[str, float]) -> float:
    """What physics allows: the products at the measured rate, or reading the touched experts once (twice, and
    writing their gradients, with a backward pass), whichever is longer."""
    one_expert = 3 * SPEC.d_model * SPEC.d_expert
    flop = 2 * tokens * SPEC.top_k * one_expert * (3 if backward else 1)
    moved = touched * one_expert * DTYPE.itemsize * (3 if backward else 1)
    return max(flop / limit["flop_per_second"], moved / limit["bytes_per_second"])


def agreeing(layer: dict[str, torch.nn.Module], x: torch.Tensor, chosen: torch.Tensor) -> int:
    """How many tokens the peers route as we do; on those the outputs must be equal, or the comparison means nothing.

    Their router multiplies in the model's dtype, ours in fp32: in bfloat16 a few near-ties go the other way.
    """
    theirs = layer["transformers eager"].gate(x)
    picked = next(t for t in theirs if not t.is_floating_point()).view(chosen.shape)
    alike = (picked.sort(1).values == chosen.sort(1).values).all(1)
    ours = layer["gpt4lib"](x)[alike]
    tolerance = (0.05 if CUDA else 1e-4) * float(ours.abs().max())
    for name in ("transformers grouped_mm", "transformers eager"):
        assert torch.allclose(ours, layer[name](x[None])[0][alike], rtol=0, atol=tolerance), name
    return int(alike.sum())


def path_of(layer: MoE, x: torch.Tensor, chosen: torch.Tensor, backward: bool) -> str:
    """Which of our implementations the timed call takes."""
    with torch.set_grad_enabled(backward):
        return kernel.choose(x, chosen, layer.experts.w_in, layer.experts.w_out)[0]


def main() -> int:
    limit, layer = limits.measure(DEVICE, DTYPE), layers()
    rows = []
    for tokens in BATCHES:
        x = torch.randn(tokens, SPEC.d_model, device=DEVICE, dtype=DTYPE)
        with torch.no_grad():
            routing = layer["gpt4lib"].router(x)
            same = agreeing(layer, x, routing.chosen)
        touched = routing.chosen.unique().numel()
        for backward in (False, True):
            calls = {name: call(l, x, backward) for name, l in layer.items()}
            times = runner.interleaved(calls, runs=9 if tokens <= 256 else 5, warm_up=2)
            least = least_seconds(tokens, touched, backward, limit)
            row = {"tokens": tokens, "pass": "forward and backward" if backward else "forward",
                   "experts_touched": touched, "tokens_routed_alike": same,
                   "expected_touched": roofline.distinct_experts(SPEC.n_experts, SPEC.top_k, tokens),
                   "path": path_of(layer["gpt4lib"], x, routing.chosen, backward),
                   **runner.against_all(times, "gpt4lib", least)}
            if CUDA and not backward:
                row["graph_seconds"] = runner.graph_seconds(lambda: layer["gpt4lib"](x))
                row["graph_percent_of_limit"] = 100 * least / row["graph_seconds"]
            rows.append(row)
            print(f"{tokens:5} {row['pass']:21} {row['path']:13}" + "  ".join(
                f"{n} {s['median'] * 1e3:.3f} ms ({s['percent_of_limit']:.0f} %)" for n, s in row["seconds"].items()), flush=True)
    shape = {"d_model": SPEC.d_model, "d_expert": SPEC.d_expert, "n_experts": SPEC.n_experts, "top_k": SPEC.top_k,
             **limits.where(DTYPE)}
    print(f"wrote {runner.write('moe_' + DEVICE, {'shape': shape, 'limit': limit, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
