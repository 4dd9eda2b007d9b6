"""Small training runs, recorded: the loss against the experts, the key/value heads, and the size and data of a model.

    python benchmarks/small_runs.py experts     writes results/experts_loss.json
    python benchmarks/small_runs.py heads       writes results/heads_loss.json
    python benchmarks/small_runs.py scaling     writes results/scaling_cpu.json, on one thread

Every run of one seed sees the same bytes in the same order and starts from the same generator, so differences between
rows of a seed are differences between the models. Losses are nats per byte on held-out documents.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import runner
import torch
import torch.nn.functional as F

from gpt4lib import ModelSpec, parameters
from gpt4lib.nn import data
from gpt4lib.nn.moe import balance_loss, routings
from gpt4lib.nn.transformer import Transformer

BASE = ModelSpec(name="small", n_layers=3, d_model=128, n_heads=8, d_ff=512, vocab_size=data.VOCAB_SIZE, context=128)
BATCH, LEARNING_RATE, WARM_UP, BALANCE = 32, 3e-3, 40, 0.01
SIZES, STEPS, BEYOND = ((2, 32), (2, 48), (2, 64), (2, 96)), (250, 500, 1000, 2000), ((3, 128), 3000)      # (layers, width)


def variants(which: str) -> dict[str, ModelSpec]:
    """Name -> spec. Experts: two active ones of width 256, as much arithmetic as the dense block of 512, and the
    router's. Heads: with one key/value head also a feed-forward block widened by as many parameters as were saved (Shazeer 2019)."""
    if which == "experts":
        moe = {f"{n} experts": BASE.with_(n_experts=n, top_k=2, d_expert=256) for n in (4, 16, 64, 128)}
        return {"dense": BASE, **moe}
    saved = parameters(BASE).total - parameters(BASE.with_(n_kv_heads=1)).total
    wider = BASE.d_ff + saved // (BASE.n_layers * 2 * BASE.d_model)
    return {"multi-head": BASE, "grouped, 2 heads": BASE.with_(n_kv_heads=2), "multi-query": BASE.with_(n_kv_heads=1),
            "multi-query, wider block": BASE.with_(n_kv_heads=1, d_ff=wider)}


def train(spec: ModelSpec, seed: int, steps: int, texts: tuple[torch.Tensor, torch.Tensor], batch_size: int = BATCH,
          learning_rate: float = LEARNING_RATE, warm_up: int = WARM_UP, looks: int = 10) -> dict:
    """One run; -> its held-out losses at `looks` steps, and how evenly the experts were used at the end."""
    model = Transformer(spec, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * i / steps)))
    order = torch.Generator().manual_seed(seed)
    held_out = data.windows(texts[1], 256, spec.context, torch.Generator().manual_seed(0))
    losses, start = {}, time.perf_counter()
    for step in range(1, steps + 1):
        batch = data.windows(texts[0], batch_size, spec.context, order)
        with routings(model) as seen:
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = sum(map(balance_loss, seen)) / len(seen) if seen else torch.zeros(())
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // looks) == 0 or step == steps:
            losses[step] = held_out_loss(model, held_out)
    used = [torch.bincount(r.chosen.flatten(), minlength=spec.n_experts) for r in seen]
    return {"seed": seed, "loss": losses[steps], "losses": losses, "seconds": time.perf_counter() - start,
            "max_over_mean_load": [float(u.max() / u.float().mean()) for u in used]}


@torch.no_grad()
def held_out_loss(model: Transformer, windows: torch.Tensor) -> float:
    """Nats per byte; evaluated in blocks of 64 windows."""
    return sum(float(F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum"))
               for w in windows.split(64)) / windows[:, 1:].numel()


def scaling(texts: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Every size for every number of steps, and one larger model trained longer, that a fit to the others has to predict.

    Each run has its own schedule, down to a tenth at its own end: the loss half-way through a longer run is not the
    loss of a shorter one (Hoffmann et al. 2022, section 3.1). The learning rate goes with one over the width.
    """
    torch.set_num_threads(1)
    rows = []
    for (n_layers, width), steps in [*((size, steps) for size in SIZES for steps in STEPS), BEYOND]:
        spec = BASE.with_(n_layers=n_layers, d_model=width, n_heads=width // 16, n_kv_heads=width // 16, d_ff=4 * width)
        run = train(spec, 0, steps, texts, batch_size=8, learning_rate=0.256 / width, warm_up=steps // 10, looks=1)
        rows.append({"n_layers": n_layers, "d_model": width, "parameters": parameters(spec).total,
                     "tokens": steps * 8 * spec.context, "loss": run["loss"], "seconds": run["seconds"]})
        print(f"{n_layers} x {width:3}  {steps:4} steps  {run['loss']:.4f} nats/byte  {run['seconds']:.0f} s", flush=True)
    return {"shape": {"threads": 1}, "learning_rate_times_width": 0.256, "fitted": rows[:-1], "beyond": rows[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("experts", "heads", "scaling"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    texts, rows = data.split(), []
    sizes = {"training": len(texts[0]), "validation": len(texts[1])}
    if arguments.which == "scaling":
        print(f"wrote {runner.write('scaling_cpu', {'bytes': sizes, **scaling(texts)})}")
        return 0
    for name, spec in variants(arguments.which).items():
        runs = []
        for seed in range(arguments.seeds):
            runs.append(train(spec, seed, arguments.steps, texts))
            print(f"{name:26} seed {seed}  {runs[-1]['loss']:.4f} nats/byte  {runs[-1]['seconds']:.0f} s", flush=True)
        count = parameters(spec)
        rows.append({"name": name, "n_experts": spec.n_experts, "n_kv_heads": spec.n_kv_heads, "d_ff": spec.d_ff,
                     "params_total": count.total, "params_active": count.active, "runs": runs})
    results = {"bytes": sizes, "steps": arguments.steps,
               "tokens_per_step": BATCH * BASE.context, "learning_rate": LEARNING_RATE, "rows": rows}
    print(f"wrote {runner.write(f'{arguments.which}_loss', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
