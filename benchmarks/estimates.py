"""Import time, training estimates per second and their errors, against llm-analysis 0.2.2 in the same run.

    python benchmarks/estimates.py          writes results/estimates.json
"""

import importlib.util
import logging
import statistics
import subprocess
import sys
import time

import runner

PEER = "llm-analysis"
SEQ_LEN = 2048


def imports(module: str):
    """A fresh interpreter that imports one module."""
    return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def plans(n: int):
    """n different layouts of GPT-3 on 1,024 A100s that both accept (the peer refuses one that it finds too large)."""
    from gpt4lib import ClusterSpec, ModelSpec, planner
    spec, device, found = ModelSpec.preset("gpt-3-175b"), ClusterSpec.preset("dgx-a100").device, []
    for plan in planner.layouts(spec, 1024, 8, 1536):
        try:
            priced_by_them(spec, device, 25e9, SEQ_LEN, plan, plan.n_micro_batches, plan.recompute, 0.5)
            found.append(plan)
        except AssertionError:
            continue
    return found[::max(len(found) // n, 1)][:n]


def ours(layouts):
    """Time by term and memory by part of every layout, with nothing kept from the time before."""
    from gpt4lib import ClusterSpec, Estimator, ModelSpec
    spec, cluster = ModelSpec.preset("gpt-3-175b"), ClusterSpec.preset("dgx-a100")

    def run() -> None:
        estimator = Estimator(spec, cluster, SEQ_LEN)
        for plan in layouts:
            estimator.estimate(plan)
    return run


def priced_by_them(spec, device, network: float, seq_len: int, plan, micro_batches: int, recompute: str,
                   efficiency: float | None):
    """What llm-analysis returns for a layout: its latency for an iteration, and its memory."""
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import GPUConfig, ModelConfig, ParallelismConfig
    model = ModelConfig("row", spec.n_layers, spec.n_heads, spec.d_model, spec.vocab_size, max_seq_len=seq_len,
                        num_key_value_heads=spec.n_kv_heads, ffn_embed_dim=spec.d_ff)
    gpu = GPUConfig(device.name, device.memory_bytes / 1e9, device.memory_bandwidth / 1e9, device.link_bandwidth / 1e9, 1e-5,
                    device.peak.get("bf16", device.peak.get("fp16")) / 1e12, inter_node_bandwidth_in_GB_per_sec=network / 1e9)
    analysis = LLMAnalysis(model, gpu, parallelism_config=ParallelismConfig(tp_size=plan.tp, pp_size=plan.pp, dp_size=plan.dp,
                                                                            sp_size=plan.tp if plan.sequence_parallel else 1),
                           flops_efficiency=efficiency)
    recomputed = {"none": "NONE", "selective": "ATTN", "full": "FULL"}[recompute]
    recomputed = getattr(ActivationRecomputation, recomputed, ActivationRecomputation.NONE)
    return analysis.training(batch_size_per_gpu=plan.micro_batch, gradient_accumulation_steps=micro_batches, seq_len=seq_len,
                             total_num_tokens=10**9, ds_zero=DSZeRO(plan.zero_stage), activation_recomputation=recomputed,
                             mlp_gated_linear_units=spec.gated_ffn)


def theirs(layouts):
    """The same layouts through their training entry point, with its logging off."""
    from gpt4lib import ClusterSpec, ModelSpec
    spec, cluster = ModelSpec.preset("gpt-3-175b"), ClusterSpec.preset("dgx-a100")

    def run() -> None:
        for plan in layouts:
            priced_by_them(spec, cluster.device, 25e9, SEQ_LEN, plan, plan.n_micro_batches, plan.recompute, 0.5)
    return run


def search() -> dict:
    """Every layout of GPT-4 on 25,000 A100s: found, priced and ranked by the planner; and priced alone."""
    from gpt4lib import ClusterSpec, Estimator, ModelSpec, planner
    spec, cluster, seconds, alone = ModelSpec.preset("gpt-4"), ClusterSpec.preset("gpt-4-training"), [], []
    layouts = list(planner.layouts(spec, 25_000, 8, 7324))
    for _ in range(5):
        start = time.perf_counter()
        planner.search(Estimator(spec, cluster, 8192), 25_000, 7324)
        seconds.append(time.perf_counter() - start)
        start, estimator = time.perf_counter(), Estimator(spec, cluster, 8192)
        for plan in layouts:
            estimator.estimate(plan)
        alone.append(time.perf_counter() - start)
    return {"layouts": len(layouts), "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
            "estimates_per_second": round(len(layouts) / statistics.median(alone))}


def errors() -> dict:
    """Step times of the shipped rows that our constants were not fitted to, dense models above 5 % MFU: ours beside
    theirs, at its default efficiency, at the one constant and at the constant for each GPU generation that suit it best on the
    rows that ours were fitted to."""
    from importlib import resources
    from gpt4lib import validation as v
    rows = v.read(resources.files("gpt4lib.analysis").joinpath("measured", "training.csv"))
    pricer, cases = v.Pricer(), []
    for row in rows:
        result = pricer.price(row)
        if not result.unpriced and result.group == "step_time" and not v.apart(result) and not row["n_experts"]:
            it = v.case(row)
            found = v.choose(pricer.estimator(it), it.plans)
            plan, step = found.plan, found.step_seconds
            ratio = result.measured / result.predicted
            measured = step * ratio if row["quantity"] == "iteration_seconds" else step / ratio
            cases.append((result, it, plan, step, measured))

    def by_document(seconds) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for (result, *_, measured), predicted in zip(cases, seconds):
            if not result.fitted and predicted:
                found.setdefault(result.document, []).append(abs(predicted / measured - 1))
        return {document: statistics.median(e) for document, e in found.items()}

    def them(efficiency) -> list[float | None]:
        """Seconds of every case, at a constant for each GPU generation."""
        out = []
        for _, it, plan, *_ in cases:
            try:
                found = priced_by_them(it.spec, it.cluster.device, it.cluster.inter_node_bandwidth, it.seq_len, plan,
                                       plan.n_micro_batches, plan.recompute, efficiency[it.cluster.device.generation])
                out.append(found["latency_per_iter"])
            except (AssertionError, UnboundLocalError):                  # what it refuses or crashes on is not priced
                out.append(None)
        return out

    def fit_loss(seconds, generation: str = "") -> float:
        off = [abs(p / m - 1) for (r, it, *_, m), p in zip(cases, seconds)
               if r.fitted and p and it.cluster.device.generation.startswith(generation)]
        return statistics.median(off) if off else 0.0

    generations = {it.cluster.device.generation for _, it, *_ in cases}
    tried = {e: them(dict.fromkeys(generations, e)) for e in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)}
    best = min(tried, key=lambda e: fit_loss(tried[e]))
    each = {g: min(tried, key=lambda e: (fit_loss(tried[e], g), e != best)) for g in sorted(generations)}
    ours = [step for *_, step, _ in cases]
    told = {"gpt4lib": ours, "gpt4lib, rows the peer prices": [step if p else None for step, p in zip(ours, tried[best])],
            f"{PEER}, default": them(dict.fromkeys(generations)), f"{PEER}, best constant": tried[best],
            f"{PEER}, best for each generation": them(each)}
    held = sum(not r.fitted for r, *_ in cases)
    return {name: {"rows": held, "priced": sum(1 for (r, *_), p in zip(cases, seconds) if p and not r.fitted),
                   "average_of_documents_median_error": statistics.mean(by_document(seconds).values()),
                   "by_document": by_document(seconds)}
            for name, seconds in told.items()}


def main() -> int:
    if importlib.util.find_spec("llm_analysis") is None:
        print(f"{PEER} is not installed; see benchmarks/README.md for the environment", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)
    layouts = plans(400)
    loads = runner.interleaved({"gpt4lib": imports("gpt4lib.cli"), PEER: imports("llm_analysis.analysis")})
    runs = runner.interleaved({"gpt4lib": ours(layouts), PEER: theirs(layouts)}, runs=7)
    results = {"import_process": runner.summary(loads, "gpt4lib", PEER),
               "training_estimates": {"estimates_per_run": len(layouts), **runner.summary(runs, "gpt4lib", PEER)},
               "search": search(), "errors": errors()}
    for name in ("gpt4lib", PEER):
        rate = len(layouts) / results["training_estimates"]["seconds"][name]["median"]
        results["training_estimates"]["seconds"][name]["estimates_per_second"] = round(rate)
        print(f"{name:13} {rate:9,.0f} estimates/s   import {results['import_process']['seconds'][name]['median']:.3f} s")
    print(f"GPT-4 on 25,000 A100s: {results['search']['layouts']:,} layouts in {results['search']['seconds']['median']:.2f} s, "
          f"{results['search']['estimates_per_second']:,} estimates/s")
    for name, told in results["errors"].items():
        print(f"{name:32} {told['priced']} of {told['rows']} rows, median error "
              f"{100 * told['average_of_documents_median_error']:.1f} % (average of documents)")
    print(f"wrote {runner.write('estimates', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
