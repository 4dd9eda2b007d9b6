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
from gpt4lib.specs.checks import require_known


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


LARGEST = 1e30           # of any number an option gives: more tokens than anybody will count


def counted(args: argparse.Namespace, *names: str, least: float = 1) -> None:
    """ValueError, one line, for an option that is given and below `least`, infinite or no number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value <= LARGEST:
            raise ValueError(f"--{name.replace('_', '-')} {str(value)[:60]} is not accepted; give a number >= {least}")


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


def _servers(args: argparse.Namespace) -> Any:
    """The estimator of what options describe; its plan fills all --gpus."""
    counted(args, "gpus", "tp", "pp", "ep")
    counted(args, "price", least=1e-9)
    spec, n = ModelSpec.load(args.model), args.gpus
    DeviceSpec.preset(args.device)
    tp = args.tp or max(n // args.pp // args.ep, 1)
    dp = n // (tp * args.pp)
    if tp * args.pp * dp != n or (args.ep > 1 and (tp * dp % args.ep or not spec.is_moe)):
        raise ValueError(f"--tp {tp} --pp {args.pp} --ep {args.ep} do not fit --gpus {n}; give tp x pp that divides it, ep for experts")
    if args.engine:
        require_known("engine", args.engine, gpt4lib.efficiency.serving().engines)
    plan = ParallelPlan(tp=tp, pp=args.pp, dp=dp, ep=math.gcd(args.ep, dp))      # over tp ranks experts are cut or spread alike
    return gpt4lib.ServingEstimator(spec, ClusterSpec.around(args.device), plan, args.dtype, args.kv_dtype, engine=args.engine)


def serve(args: argparse.Namespace) -> tuple[Any, str]:
    """Latency, throughput, money and memory of serving a model to many clients."""
    counted(args, "batch", "input", "output")
    estimator, n, longest = _servers(args), args.gpus, args.input + args.output
    spec, plan, device, room = estimator.spec, estimator.plan, estimator.cluster.device, estimator.largest_batch(longest)
    replicas, inference = min(plan.dp // plan.ep, args.batch), gpt4lib.inference         # no more than have a client
    if longest > spec.context:
        raise ValueError(f"--input {args.input} and --output {args.output} are more than {spec.name}'s context of {spec.context}; lower one")
    if room < 1:
        weights = fmt.bytes_si(estimator.memory(1, 1).by_part["weights"])
        raise ValueError(f"no request of {longest} tokens fits: weights {weights} of {fmt.bytes_si(device.memory_bytes)}; "
                         f"give more --gpus or a smaller --dtype")
    found = inference.under_load(estimator, args.batch / replicas, args.input, args.output)
    used, table = _bytes(estimator.memory(max(int(found.running), 1), args.input + args.output // 2), device)
    money = [found.dollars_per_1k(n // replicas, args.price, args.utilisation, input_len=length) for length in (args.input, 0)]
    rate = replicas * found.tokens_per_second
    data = {"ttft_seconds": found.ttft_seconds, "tpot_seconds": found.tpot_seconds, "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / n, "dollars_per_1k_input_tokens": money[0],
            "dollars_per_1k_output_tokens": money[1], "joules_per_1k_output_tokens":
            1000 * gpt4lib.cost.joules(n, 1 / rate, device.power_watts), "bound_by": found.decode.bound_by, "memory":
            {**used, "fits": used["total"] <= device.memory_bytes}, "running": replicas * found.running, "largest_batch":
            int(replicas * room), "largest_context": estimator.largest_context(args.batch / replicas), "plan": asdict(plan),
            "by_term": found.decode.by_term}
    return data, (f"{spec.name} to {args.batch} clients, {args.input} tokens in, {args.output} out, {n} x {args.device}, "
                  f"{gpt4lib.planner.name(plan)}\nfirst token after {fmt.seconds(found.ttft_seconds)}, then one every "
                  f"{fmt.seconds(found.tpot_seconds)}\n{fmt.count(rate)} tokens/s, {fmt.count(rate / n)} a device; a thousand tokens in "
                  f"{fmt.dollars(money[0])}, out {fmt.dollars(money[1])}; room for {data['largest_batch']} requests\n\n"
                  f"one decode step\n{found.decode.explain()}\n\n{table}")


def simulate(args: argparse.Namespace) -> tuple[Any, str]:
    """Requests over time through the engine's own scheduler, with predicted steps for a clock."""
    from gpt4lib.serving import simulator
    counted(args, "input", "output", "max_running", "max_batched_tokens")
    counted(args, "seconds", "ttft", "tpot", least=1e-9)
    if (args.trace is None) == (args.rate is None):
        raise ValueError("give either --trace FILE or --rate REQUESTS_A_SECOND")
    require_known("shape", args.shape, shapes := {"poisson": simulator.poisson, "bursts": simulator.bursts, "diurnal": simulator.diurnal})
    estimator = _servers(args)
    requests = simulator.read(args.trace) if args.trace else shapes[args.shape](
        args.rate, args.seconds, prompt=args.input, answer=args.output, longest=estimator.spec.context // 2, seed=args.seed)
    lanes = simulator.cluster(estimator, max_running=args.max_running, max_batched_tokens=args.max_batched_tokens)
    report = simulator.simulate(requests, lanes, _told if sys.stderr.isatty() else None)
    if not report.ttft:
        raise ValueError(f"no request was answered, {report.refused} were too long; give a trace with requests that fit")
    share = lambda values: {f"p{q}": simulator.quantile(values, q / 100) for q in (50, 90, 99)}        # noqa: E731
    data = {"requests": len(report.ttft), "refused": report.refused, "seconds": report.seconds, "ttft_seconds": share(report.ttft),
            "tpot_seconds": share(report.tpot), "goodput_requests_per_second": report.goodput(args.ttft, args.tpot),
            "tokens_per_second": report.tokens_per_second, "utilisation": report.utilisation, "preemptions": report.preemptions,
            "dollars_per_1k_output_tokens": report.dollars_per_1k_tokens(args.gpus, args.price), "plan": asdict(estimator.plan)}
    rows = [(name, *map(fmt.seconds, data[key].values())) for name, key in (("first token", "ttft_seconds"), ("each after it", "tpot_seconds"))]
    return data, (f"{estimator.spec.name} on {args.gpus} x {args.device}, {gpt4lib.planner.name(estimator.plan)}: {len(report.ttft)} requests in "
                  f"{fmt.seconds(report.seconds)}, {report.refused} refused, {report.preemptions} preemptions\n"
                  f"{fmt.count(report.tokens_per_second)} tokens/s, busy {fmt.percent(report.utilisation)} of the time, "
                  f"{fmt.dollars(data['dollars_per_1k_output_tokens'])} for a thousand tokens of answers\n"
                  f"{data['goodput_requests_per_second']:.3g} requests a second within {args.ttft:g} s and {args.tpot:g} s a token\n\n"
                  + fmt.table(rows, ("seconds to", "half", "nine tenths", "99 %"), right=(1, 2, 3)))


def _told(now: float) -> None:
    sys.stderr.write(f"\r{fmt.seconds(now)} simulated ")


def validate(args: argparse.Namespace) -> tuple[Any, str]:
    """Predictions beside published measurements."""
    v = gpt4lib.validation
    rows, pricer = v.read(args.file), v.Pricer()
    results = [pricer.price(row) for row in rows]
    args.problems = [row["problem"] for row in rows if row["problem"]]
    groups = {group: [r for r in results if r.group == group] for group in dict.fromkeys(r.group for r in results)}
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
    if any(row["format"] == "serving" for row in rows):
        data |= {f"by_{kind}": v.by(results, lambda r: f"{getattr(r, kind)}, {r.group}") for kind in ("engine", "model", "device")}
        table = [line(name, s) for kind in ("engine", "model", "device") for name, s in sorted(data[f"by_{kind}"].items())]
    else:
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
            plan: "model machine plan", serve: "model servers serve", simulate: "model servers simulate",
            validate: "validate", claims: "claims"}


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
