"""Small training runs, recorded: the loss against the number of experts, and against the number of key/value heads.

    python benchmarks/small_runs.py experts     writes results/experts_loss.json
    python benchmarks/small_runs.py heads       writes results/heads_loss.json

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


def train(spec: ModelSpec, seed: int, steps: int, texts: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """One run; -> its held-out losses by step, and how evenly the experts were used at the end."""
    model = Transformer(spec, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARM_UP, 0.55 + 0.45 * math.cos(math.pi * i / steps)))
    order = torch.Generator().manual_seed(seed)
    held_out = data.windows(texts[1], 256, spec.context, torch.Generator().manual_seed(0))
    losses, start = {}, time.perf_counter()
    for step in range(1, steps + 1):
        batch = data.windows(texts[0], BATCH, spec.context, order)
        with routings(model) as seen:
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = sum(map(balance_loss, seen)) / len(seen) if seen else torch.zeros(())
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            losses[step] = held_out_loss(model, held_out)
    used = [torch.bincount(r.chosen.flatten(), minlength=spec.n_experts) for r in seen]
    return {"seed": seed, "loss": losses[steps], "losses": losses, "seconds": time.perf_counter() - start,
            "max_over_mean_load": [float(u.max() / u.float().mean()) for u in used]}


@torch.no_grad()
def held_out_loss(model: Transformer, windows: torch.Tensor) -> float:
    """Nats per byte; evaluated in blocks of 64 windows."""
    return sum(float(F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum"))
               for w in windows.split(64)) / windows[:, 1:].numel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("experts", "heads"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    texts, rows = data.split(), []
    for name, spec in variants(arguments.which).items():
        runs = []
        for seed in range(arguments.seeds):
            runs.append(train(spec, seed, arguments.steps, texts))
            print(f"{name:26} seed {seed}  {runs[-1]['loss']:.4f} nats/byte  {runs[-1]['seconds']:.0f} s", flush=True)
        count = parameters(spec)
        rows.append({"name": name, "n_experts": spec.n_experts, "n_kv_heads": spec.n_kv_heads, "d_ff": spec.d_ff,
                     "params_total": count.total, "params_active": count.active, "runs": runs})
    results = {"bytes": {"training": len(texts[0]), "validation": len(texts[1])}, "steps": arguments.steps,
               "tokens_per_step": BATCH * BASE.context, "learning_rate": LEARNING_RATE, "rows": rows}
    print(f"wrote {runner.write(f'{arguments.which}_loss', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
