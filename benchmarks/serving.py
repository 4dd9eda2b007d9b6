"""The engine on a ragged mix of requests, against transformers' `generate` and `generate_batch` with the same weights.

    python benchmarks/serving.py       writes results/serving_cpu.json, or results/serving_cuda.json where there is a GPU

Everybody answers the same prompts, greedily, to the same lengths. `generate` gets padded batches, of the size that suits it best,
and ends a batch with its longest answer. On a CPU the model is small and fp32; on a GPU it is Llama 3.1 8B's shape in bfloat16.
Also: static batching in our own engine, batch size against latency, a shared prompt with and without the prefix cache, and
what a step of the scheduler costs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time

import limits
import runner
import torch
from limits import CUDA

from gpt4lib import ModelSpec
from gpt4lib.nn import checkpoint
from gpt4lib.nn.cache import Pages
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.llm import LLM
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.serving.timeline import Timeline

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SMALL = ModelSpec("small", n_layers=8, d_model=512, n_heads=8, head_dim=64, n_kv_heads=2, d_ff=1408, gated_ffn=True, norm="rmsnorm",
                  vocab_size=8192, context=1024, tied=False)
TINY = SMALL.with_(name="tiny", n_layers=4, d_model=128, n_heads=4, head_dim=32, n_kv_heads=1, d_ff=352, vocab_size=512)
SPEC = ModelSpec.preset("llama-3.1-8b") if CUDA else SMALL
REQUESTS, PROMPT, ANSWER = (512, (400, 2000), (200, 1500)) if CUDA else (96, (40, 200), (48, 256))      # (mean, at most)
BATCHES = (1, 4, 16, 64, 256) if CUDA else (1, 2, 4, 8, 16, 32)
BUDGET, PAGE = 2048 if CUDA else 256, 64


def mix(n: int, vocab_size: int = SPEC.vocab_size, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts and lengths of answers, both exponential and cut: most are short, a few are long."""
    dice = random.Random(seed)
    draw = lambda mean, most: min(4 + int(dice.expovariate(1 / mean)), most)
    prompts = [[dice.randrange(vocab_size) for _ in range(draw(*PROMPT))] for _ in range(n)]
    return prompts, [draw(*ANSWER) for _ in range(n)]


def pages(batch: int, prompts, lengths) -> int:
    """Pages that both continuous engines get: enough for the longest request on every seat."""
    return batch * ((max(map(len, prompts)) + max(lengths)) // PAGE + 2)


class Ours:
    """An LLM made anew for every call, so that no call finds another's blocks."""

    def __init__(self, model: Transformer, batch: int, **options) -> None:
        self.model, self.batch, self.options = model, batch, {"max_running": batch, "max_batched_tokens": BUDGET, **options}

    def __call__(self, prompts, lengths) -> list[list[int]]:
        kv_bytes = pages(self.batch, prompts, lengths) * Pages.page_bytes(self.model.spec, PAGE, DTYPE)
        self.llm = LLM(self.model, kv_bytes=kv_bytes, **self.options)
        self.timeline = Timeline(self.llm.engine.scheduler)
        self.llm.engine.on_step = self.timeline.record
        outputs = self.llm.generate(prompts, [SamplingParams(max_tokens=n) for n in lengths], progress=False)
        return [o.answers[0].generated for o in outputs]


class Generate:
    """transformers' `generate`: batches in order of arrival, padded on the left, each ended by its longest answer."""

    def __init__(self, model, batch: int) -> None:
        self.model, self.batch = model, batch

    @torch.inference_mode()
    def __call__(self, prompts, lengths) -> list[list[int]]:
        from transformers import StoppingCriteria

        class Lengths(StoppingCriteria):
            def __init__(self, start: int, lengths: list[int]) -> None:
                self.start, self.lengths = start, torch.tensor(lengths, device=DEVICE)

            def __call__(self, ids, scores, **_) -> torch.Tensor:
                return ids.shape[1] - self.start >= self.lengths

        answers = []
        for i in range(0, len(prompts), self.batch):
            part, n = prompts[i:i + self.batch], lengths[i:i + self.batch]
            width = max(map(len, part))
            ids, mask = (torch.tensor(rows, device=DEVICE) for rows in (
                [[0] * (width - len(p)) + p for p in part], [[0] * (width - len(p)) + [1] * len(p) for p in part]))
            out = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(n), eos_token_id=None,
                                      pad_token_id=0, stopping_criteria=[Lengths(width, n)])
            answers += [row[width:width + k].tolist() for row, k in zip(out, n)]
        return answers


class GenerateBatch:
    """transformers' own continuous batching."""

    def __init__(self, model, batch: int) -> None:
        self.model, self.batch = model, batch

    @torch.inference_mode()
    def __call__(self, prompts, lengths) -> list[list[int]]:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        config = ContinuousBatchingConfig(max_requests_per_batch=self.batch, max_batch_tokens=BUDGET, page_size=PAGE,
                                          num_blocks=pages(self.batch, prompts, lengths))
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(lengths))
        with self.model.continuous_batching_context_manager(generation_config=greedy, continuous_batching_config=config) as manager:
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths)]
            found = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("generate_batch ended before its requests")
        return [found[name] for name in names]


def models(spec: ModelSpec = SPEC) -> tuple[Transformer, torch.nn.Module]:
    """Ours and theirs with the same weights."""
    from transformers import AutoModelForCausalLM
    ours = Transformer(spec, seed=0).to(DEVICE, DTYPE).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(ours, folder)
        return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).eval()


def against(ours: Transformer, theirs: torch.nn.Module, limit: dict[str, float]) -> dict:
    """Tokens a second of everybody on the mix, ours continuous and static; the limit is the arithmetic of every token once."""
    prompts, lengths = mix(REQUESTS, ours.spec.vocab_size)
    trial = {b: timed(Generate(theirs, b), prompts, lengths) for b in BATCHES[2:]}
    best = min(trial, key=trial.get)
    engines = {"gpt4lib": Ours(ours, BATCHES[-1]), "gpt4lib static": Ours(ours, BATCHES[-1], continuous=False),
               "transformers generate": Generate(theirs, best), "transformers generate_batch": GenerateBatch(theirs, BATCHES[-1])}
    answers = {name: engine(prompts, lengths) for name, engine in engines.items()}
    assert all(len(a) == n for given in answers.values() for a, n in zip(given, lengths))
    alike = {name: sum(x == y for a, b in zip(given, answers["gpt4lib"]) for x, y in zip(a, b)) / sum(lengths)
             for name, given in answers.items()}
    seconds = runner.interleaved({name: limits.waited(lambda e=e: e(prompts, lengths)) for name, e in engines.items()}, runs=5, warm_up=0)
    head, tokens = ours.head.weight.numel(), sum(map(len, prompts)) + sum(lengths) - len(prompts)
    products = sum(p.numel() for p in ours.parameters() if p.dim() == 2) - ours.embedding.weight.numel() - head
    flop = 2 * (tokens * products + sum(lengths) * head)
    use = {name: {"batch": e.options["max_running"], "steps": e.timeline.steps, "seat_use": e.timeline.utilisation}
           for name, e in engines.items() if isinstance(e, Ours)}
    return {"requests": REQUESTS, "prompt_tokens": sum(map(len, prompts)), "answer_tokens": sum(lengths), "longest_answer": max(lengths),
            "generate_batch_sizes_tried": trial, "batch": {"transformers generate": best}, "tokens_alike": alike, "ours": use,
            "flop": flop, **runner.against_all(seconds, "gpt4lib", flop / limit["flop_per_second"]),
            "tokens_per_second": {name: sum(lengths) / statistics.median(s) for name, s in seconds.items()}}


def timed(call, *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def batch_sizes(ours: Transformer, limit: dict[str, float]) -> list[dict]:
    """Decode steps with a full batch: seconds each, and what reading weights and cache once, or the arithmetic, would take."""
    rows, weights = [], [p for p in ours.parameters()]
    read_once = sum(p.nbytes for p in weights) - ours.embedding.weight.nbytes
    products = sum(p.numel() for p in weights if p.dim() == 2) - ours.embedding.weight.numel()
    for batch in BATCHES:
        llm = LLM(ours, max_running=batch, max_batched_tokens=max(BUDGET, batch), kv_bytes=40e9 if CUDA else 3e8)
        for prompt in mix(batch)[0]:
            llm.engine.add([*prompt, *[1] * 200][:200], SamplingParams(max_tokens=80))
        llm.engine.step()
        while llm.engine.scheduler.waiting or any(s.n_tokens - s.n_computed > 1 for s in llm.engine.scheduler.running):
            llm.engine.step()
        context = sum(s.n_tokens for s in llm.engine.scheduler.running)
        spec = ours.spec
        kv = 2 * context * spec.n_layers * spec.kv_width * DTYPE.itemsize
        flop = 2 * batch * products + 4 * context * spec.n_layers * spec.q_width
        least = max((read_once + kv) / limit["bytes_per_second"], flop / limit["flop_per_second"])
        step = limits.waited(llm.engine.step)
        for _ in range(3):
            step()
        seconds = statistics.median(timed(step) for _ in range(21))
        rows.append({"batch": batch, "context": context, "step_seconds": seconds, "tokens_per_second": batch / seconds,
                     "bound_by": "memory" if least > flop / limit["flop_per_second"] else "compute",
                     "percent_of_limit": 100 * least / seconds})
    return rows


def shared_prompt(ours: Transformer) -> dict:
    """Requests that all begin with the same system prompt: seconds, and prompt tokens computed, with and without its cache."""
    dice, (prompts, _) = random.Random(1), mix(32, seed=1)
    system = [dice.randrange(SPEC.vocab_size) for _ in range(400)]
    prompts = [system + p[:40] for p in prompts]
    engines = {"cached": Ours(ours, 8), "not cached": Ours(ours, 8, prefix_cache=False)}
    same = [e(prompts, [8] * 32) for e in engines.values()]
    seconds = runner.interleaved({name: limits.waited(lambda e=e: e(prompts, [8] * 32)) for name, e in engines.items()}, runs=5, warm_up=0)
    computed = {name: sum(s.tokens for s in e.timeline.slots) for name, e in engines.items()}
    return {"requests": 32, "shared_tokens": 400, "tokens_computed": computed, "answers_alike": sum(a == b for a, b in zip(*same)),
            **runner.summary(seconds, "cached", "not cached")}


def scheduler_step(running: int = 512) -> dict:
    """Seconds of the scheduler alone for a step of that many decoding sequences: schedule, advance, append."""
    scheduler = Scheduler(BlockPool(running * 64, 16), running)
    for i in range(running):
        scheduler.add(Sequence(range(i, i + 100), 800))

    def step() -> None:
        for group in scheduler.advance(scheduler.schedule()):
            for sequence in group:
                scheduler.append(sequence, 1)
    while scheduler.waiting or any(s.n_tokens - s.n_computed > 1 for s in scheduler.running):
        step()
    seconds = sorted(timed(step) for _ in range(200))
    return {"running": running, "median_seconds": statistics.median(seconds), "p99_seconds": seconds[198]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("against", "against_tiny", "batch_sizes", "shared_prompt", "scheduler_step"), help="print one part, write nothing")
    only = parser.parse_args().only
    if only == "scheduler_step":
        print(scheduler_step())
        return 0
    limit = limits.measure(DEVICE, DTYPE)
    ours, theirs = models()
    parts = {"scheduler_step": scheduler_step, "batch_sizes": lambda: batch_sizes(ours, limit), "shared_prompt": lambda: shared_prompt(ours),
             "against": lambda: against(ours, theirs, limit), **({} if CUDA else {"against_tiny": lambda: against(*models(TINY), limit)})}
    results = {}
    for name, part in parts.items():
        if only in (None, name):
            results[name] = part()
            print(name, results[name], flush=True)
    if only is None:
        model = {"parameters": sum(p.numel() for p in ours.parameters()), "spec": SPEC.name}
        print(f"wrote {runner.write('serving_' + DEVICE, {'shape': limits.where(DTYPE), 'limit': limit, 'model': model, **results})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
