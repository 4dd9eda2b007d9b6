"""`gpt4lib COMMAND ...`: the calculator on a command line. Tables for people, --json for machines."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, fields
from typing import Any, NoReturn, Sequence

import gpt4lib                                    # whose modules load on first use
from gpt4lib import format as fmt
from gpt4lib.specs import ClusterSpec, DeviceSpec, ModelSpec, ParallelPlan, registry


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (try: {self.prog} --help)")


def params(args: argparse.Namespace) -> tuple[Any, str]:
    """Exact parameter counts by part, total and active."""
    spec = ModelSpec.load(args.model)
    count = gpt4lib.parameters(spec)
    data = {"model": spec.name, "total": count.total, "active": count.active, "by_part": count.by_part}
    rows = [(part.replace("_", " "), f"{n:,}", fmt.percent(n / count.total)) for part, n in count.by_part.items() if n]
    rows += [("total", f"{count.total:,}", fmt.count(count.total)), ("active", f"{count.active:,}", fmt.count(count.active))]
    text = fmt.table(rows, ("part", "parameters", "share"), right=(1, 2))
    if spec.name in ModelSpec.presets():            # nothing is known about a file of the user's
        known: dict[str, list[str]] = {}
        for field, source in registry.provenance("models", spec.name).items():
            known.setdefault(source.status, []).append(field)
        text += "\n\n" + "\n".join(f"{status}: {', '.join(names)}" for status, names in known.items())
    return data, f"{spec.name}\n{text}"


def layout(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a ParallelPlan that options give; a flag that is not set gives none."""
    given = {f.name: getattr(args, f.name, None) for f in fields(ParallelPlan)}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def counted(args: argparse.Namespace, *names: str, least: float = 1) -> None:
    """ValueError, one line, for an option that is given and below `least`, infinite or no number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} is not accepted; give a number >= {least}")


def _estimator(args: argparse.Namespace, spec: ModelSpec) -> Any:
    DeviceSpec.preset(args.device)
    context = spec.context if args.context is None else args.context
    return gpt4lib.Estimator(spec, ClusterSpec.around(args.device), context, args.dtype, args.gradient_dtype)


def _bytes(use: Any, device: DeviceSpec) -> tuple[dict[str, float], str]:
    data = {**use.by_part, "total": use.total}
    rows = [(part.replace("_", " "), fmt.bytes_si(n), fmt.bytes_iec(n)) for part, n in data.items()]
    verdict = "fits in" if use.fits(device) else "does not fit in"
    return data, fmt.table(rows, ("part", "GB", "GiB"), right=(1, 2)) + f"\n{verdict} {fmt.bytes_si(device.memory_bytes)}"


def memory(args: argparse.Namespace) -> tuple[Any, str]:
    """Bytes on the fullest device, training or (--kv) serving."""
    counted(args, "context", "batch", "dp", "n_micro_batches")
    spec, device = ModelSpec.load(args.model), DeviceSpec.preset(args.device)
    plan, context = ParallelPlan(**layout(args)), args.context or spec.context
    use = (gpt4lib.memory.serving(spec, plan, args.batch, context, args.dtype, args.kv_dtype) if args.kv
           else _estimator(args, spec).estimate(plan).memory)
    data, text = _bytes(use, device)
    what = f"serving {args.batch} x {context} tokens" if args.kv else f"training on {context} tokens a sequence"
    return ({"bytes_per_device": data, "fits": use.fits(device)},
            f"{spec.name}, {what}, {plan.n_devices} x {args.device}, the fullest one\n{text}")


def train(args: argparse.Namespace) -> tuple[Any, str]:
    """Time, money and memory of a training run, under a given layout or the best one."""
    counted(args, "context", "batch", "gpus", "tokens")
    counted(args, "price", "mtbf", "checkpoint_seconds", "restart_seconds", least=1e-9)
    estimator = _estimator(args, ModelSpec.load(args.model))
    near = max(round(4e6 / estimator.seq_len), 1)
    batch = args.batch or (near - near % args.gpus if near > args.gpus else near)
    if given := layout(args):
        bare = ParallelPlan(dp=max(args.ep or 1, 1), **given)
        dp = args.gpus // (bare.tp * bare.pp * bare.cp) // bare.ep * bare.ep
        if not dp:
            raise ValueError(f"the layout needs {bare.n_devices} devices, --gpus is {args.gpus}; lower one of the degrees")
        micros = max(round(batch / (dp * bare.micro_batch)), 1)
        found = estimator.estimate(ParallelPlan(dp=dp, n_micro_batches=micros, **given))
    else:
        found = gpt4lib.planner.search(estimator, args.gpus, batch).best
    device, useful = estimator.cluster.device, 1.0
    if args.mtbf:
        useful = gpt4lib.cost.goodput(found.plan.n_devices, args.mtbf, args.checkpoint_seconds, args.restart_seconds).fraction
    tokens_per_step = found.plan.global_batch * estimator.seq_len
    run = gpt4lib.cost.run(found.plan.n_devices, found.step_seconds, tokens_per_step, args.tokens, args.price,
                           device.power_watts, useful)
    used, table = _bytes(found.memory, device)
    data = {"flop": args.tokens / tokens_per_step * found.flop, "mfu": found.mfu, "hfu": found.hfu,
            "step_seconds": found.step_seconds, "days": run.seconds / gpt4lib.training.SECONDS_PER_DAY,
            "gpu_hours": run.device_hours, "dollars": run.dollars, "joules": run.joules, "goodput": useful,
            "plan": asdict(found.plan), "memory": {**used, "fits": found.memory.fits(device)}, "by_term": found.by_term}
    return data, (f"{estimator.spec.name} on {fmt.count(args.tokens)} tokens, {found.plan.n_devices} x {args.device}, "
                  f"{gpt4lib.planner.name(found.plan)}\n{fmt.seconds(run.seconds)}, {fmt.count(run.device_hours)} GPU-hours, "
                  f"{fmt.dollars(run.dollars)} at ${args.price:g}, {run.joules / 3.6e12:,.3g} GWh, goodput {fmt.percent(useful)}\n\n"
                  f"{found.explain()}\n{table.splitlines()[-1]}")


def plan(args: argparse.Namespace) -> tuple[Any, str]:
    """The best layouts, and why each of the others loses."""
    planner = gpt4lib.planner
    counted(args, "context", "batch", "gpus", "top")
    estimator = _estimator(args, ModelSpec.load(args.model))
    found = planner.search(estimator, args.gpus, args.batch)
    shown = found.fitting[:args.top] or [found.best]
    losers = found.fitting[args.top::max(len(found.fitting) // args.top, 1)][:args.top] + found.too_large[:args.top]
    data = {"layouts": len(found.fitting) + len(found.too_large), "fitting": len(found.fitting),
            "best": [{"plan": asdict(e.plan), "step_seconds": e.step_seconds, "mfu": e.mfu, "tokens_per_second":
                      planner.rate(e, estimator.seq_len), "memory": e.memory.total} for e in shown],
            "losers": [{"plan": asdict(e.plan), "why": found.why(e)} for e in losers]}
    rows = [(planner.name(e.plan), fmt.seconds(e.step_seconds), fmt.percent(e.mfu), fmt.bytes_si(e.memory.total), found.why(e))
            for e in shown]
    return data, (f"{estimator.spec.name} on {args.gpus} x {args.device}, {args.batch} x {estimator.seq_len} tokens a step: "
                  f"{data['fitting']} of {data['layouts']} layouts fit\n"
                  + fmt.table(rows, ("layout", "step", "MFU", "memory", "why"), right=(1, 2, 3)) + "\n\nsome of the others\n"
                  + fmt.table([(planner.name(e.plan), found.why(e)) for e in losers]))


def serve(args: argparse.Namespace) -> tuple[Any, str]:
    """Latency, throughput, money and memory of serving a model to many clients."""
    inference = gpt4lib.inference
    counted(args, "gpus", "batch", "input", "output", "tp", "pp", "ep")
    counted(args, "price", least=1e-9)
    spec, n = ModelSpec.load(args.model), args.gpus
    DeviceSpec.preset(args.device)
    tp = args.tp or max(n // args.pp // args.ep, 1)
    dp = n // (tp * args.pp)
    if tp * args.pp * dp != n or (args.ep > 1 and (tp * dp % args.ep or not spec.is_moe)):
        raise ValueError(f"--tp {tp} --pp {args.pp} --ep {args.ep} do not fit --gpus {n}; tp x pp divides it, and ep, for a mixture "
                         f"of experts, tp x its replicas")
    ep = math.gcd(args.ep, dp)                       # over the ranks of tp experts are cut or spread alike
    plan = ParallelPlan(tp=tp, pp=args.pp, dp=dp, ep=ep)
    estimator = gpt4lib.ServingEstimator(spec, ClusterSpec.around(args.device), plan, args.dtype, args.kv_dtype, engine=args.engine)
    longest, replicas = args.input + args.output, dp // ep
    if (room := estimator.largest_batch(longest)) < 1:
        raise ValueError(f"no request of {longest} tokens fits: weights {fmt.bytes_si(estimator.memory(1, 1).by_part['weights'])} of "
                         f"{fmt.bytes_si(estimator.cluster.device.memory_bytes)}; give more --gpus or a smaller --dtype")
    found = inference.under_load(estimator, args.batch / replicas, args.input, args.output)
    used, table = _bytes(estimator.memory(max(int(found.running), 1), longest), estimator.cluster.device)
    devices = n // replicas
    money = {f"dollars_per_1k_{what}_tokens": found.dollars_per_1k(devices, args.price, args.utilisation, input_len=length)
             for what, length in (("input", args.input), ("output", 0))}
    rate = replicas * found.tokens_per_second
    joules = 1000 * gpt4lib.cost.joules(n, 1 / rate, estimator.cluster.device.power_watts)
    data = {"ttft_seconds": found.ttft_seconds, "tpot_seconds": found.tpot_seconds, "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / n, **money, "joules_per_1k_output_tokens": joules,
            "bound_by": found.decode.bound_by, "memory": {**used, "fits": estimator.memory(1, longest).fits(estimator.cluster.device)},
            "running": replicas * found.running, "largest_batch": int(replicas * room),
            "largest_context": estimator.largest_context(args.batch / replicas), "plan": asdict(plan), "by_term": found.decode.by_term}
    (first, first90), (each, each90) = (gpt4lib.efficiency.error(q, "serving.toml") for q in ("ttft", "tpot"))
    bars = f"{fmt.percent(first, 0)} and {fmt.percent(each, 0)}, nine in ten within {fmt.percent(first90, 0)} and {fmt.percent(each90, 0)}"
    return data, (f"{spec.name} to {args.batch} clients, {args.input} tokens in, {args.output} out, {n} x {args.device}, "
                  f"{gpt4lib.planner.name(plan)}\nfirst token after {fmt.seconds(found.ttft_seconds)}, then one every "
                  f"{fmt.seconds(found.tpot_seconds)}; of measured runs not used for fitting half are within {bars}\n"
                  f"{fmt.count(rate)} tokens/s, {fmt.count(rate / n)} a device; a thousand tokens in "
                  f"{fmt.dollars(money['dollars_per_1k_input_tokens'])}, out {fmt.dollars(money['dollars_per_1k_output_tokens'])}; "
                  f"room for {data['largest_batch']} requests\n\none decode step\n{found.decode.explain()}\n\n{table}")


def validate(args: argparse.Namespace) -> tuple[Any, str]:
    """Predictions beside published measurements."""
    v = gpt4lib.validation
    rows, pricer = v.read(args.file), v.Pricer()
    results = [pricer.price(row) for row in rows]
    args.problems = [row["problem"] for row in rows if row["problem"]]
    groups = {group: [r for r in results if r.group == group] for group in ("step_time", "peak_memory_bytes")}
    parts = {"all": results, "held out": [r for r in results if not r.fitted], "fitted": [r for r in results if r.fitted]}
    told = {f"{group}, {part}": v.average(v.by_source(r for r in found if r.group == group))
            for group in groups for part, found in parts.items()}
    well, badly = [r for r in results if not v.apart(r)], [r for r in results if v.apart(r)]
    data = {"overall": v.summary(well), "below_5_percent_mfu": v.summary(badly), "by_source": v.by_source(results),
            "by_quantity": {q: v.summary(r for r in well if r.quantity == q) for q in dict.fromkeys(r.quantity for r in results)},
            "average_of_sources": told, "ran_but_predicted_not_to_fit": sum(r.fits is False for r in results),
            "rows": [{"id": r.id, "quantity": r.quantity, "measured": r.measured, **(
                {"unpriced": r.unpriced} if r.unpriced else
                {"predicted": r.predicted, "error": r.error, "bound_by": r.bound_by, "fitted": r.fitted})} for r in results]}
    percent = lambda x: "" if x is None else fmt.percent(x)                                     # noqa: E731
    line = lambda name, s: (name, *(s.get(k, "") for k in ("n", "priced")), *(percent(s.get(k)) for k in v.FIGURES))  # noqa: E731
    table = [line(f"{source[:60]}, {group.split('_')[0]}", s) for group, found in groups.items()
             for source, s in v.by_source(found).items()]
    table += [line(f"average of sources: {name}", s) for name, s in told.items()] + [line("every row", data["overall"])]
    table += [line("every row below 5 % MFU", data["below_5_percent_mfu"])] if badly else []
    text = fmt.table(table, ("source", "n", "priced", "median", "mean", "p90", "bias"), right=(1, 2, 3, 4, 5, 6))
    text += f"\n\n{data['ran_but_predicted_not_to_fit']} of {len(results)} rows ran although they are predicted not to fit"
    unpriced = [f"{r.id}: {r.unpriced}" for r in results if r.unpriced]
    return data, text + ("\n\nnot priced\n" + "\n".join(unpriced) if unpriced else "")


def claims(args: argparse.Namespace) -> tuple[Any, str]:
    """The claims of the notes, recomputed and judged."""
    ledger = gpt4lib.ledger
    found = ledger.load() if args.id is None else [ledger.claim(args.id)]
    return [ledger.as_json(c) for c in found], ledger.table(found) if args.id is None else ledger.detail(*found)


# What each command does, and the groups of options.toml it takes.
COMMANDS = {params: "model", memory: "model machine layout memory", train: "model machine layout train",
            plan: "model machine plan", serve: "model serve", validate: "validate", claims: "claims"}


def options(parser: Parser, groups: str) -> None:
    """Add the options that these groups of options.toml hold."""
    for group in groups.split():
        for flag, words in registry.read("gpt4lib", "options.toml")[group].items():
            kind = {"type": {"int": int, "float": float}[words["type"]]} if "type" in words else {}
            parser.add_argument(flag, **words | kind)


def build() -> Parser:
    parser = Parser(prog="gpt4lib", description="What a GPT-4-class model costs: predicted from its description.")
    parser.add_argument("--version", action="version", version=f"gpt4lib {gpt4lib.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for run, groups in COMMANDS.items():
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        options(command, f"every {groups}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad input (one line on stderr), 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        args = build().parse_args(argv)
        data, text = args.run(args)
        print(json.dumps(data, ensure_ascii=False, indent=2) if args.json else text, flush=True)
        problems = getattr(args, "problems", [])
        for problem in problems:
            print(f"gpt4lib: {problem}", file=sys.stderr)
        return 2 if problems else 0
    except ValueError as error:
        print(f"gpt4lib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:                       # the reader of a pipe left: nothing more to say, also at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
