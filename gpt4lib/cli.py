"""`gpt4lib COMMAND ...`: the calculator on a command line. Tables for people, --json for machines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, NoReturn, Sequence

from gpt4lib import __version__
from gpt4lib import format as fmt
from gpt4lib.specs.model import ModelSpec


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (try: {self.prog} --help)")


def _status(spec: ModelSpec) -> dict[str, str]:
    """field -> status for a preset; nothing is known about a file of the user's."""
    from gpt4lib.specs import registry
    if spec.name not in registry.names("models"):
        return {}
    return {field: s.status for field, s in registry.provenance("models", spec.name).items()}


def params(args: argparse.Namespace) -> tuple[Any, str]:
    """Exact parameter counts by part, total and active."""
    from gpt4lib.analysis.parameters import parameters
    spec = ModelSpec.load(args.model)
    count = parameters(spec)
    data = {"model": spec.name, "total": count.total, "active": count.active, "by_part": count.by_part}
    rows = [(part.replace("_", " "), f"{n:,}", fmt.percent(n / count.total)) for part, n in count.by_part.items() if n]
    rows += [("total", f"{count.total:,}", fmt.count(count.total)), ("active", f"{count.active:,}", fmt.count(count.active))]
    text = fmt.table(rows, ("part", "parameters", "share"), right=(1, 2))
    status = _status(spec)
    if status:
        kinds = {s: [f for f, t in status.items() if t == s] for s in dict.fromkeys(status.values())}
        text += "\n\n" + "\n".join(f"{kind}: {', '.join(fields)}" for kind, fields in kinds.items())
    return data, f"{spec.name}\n{text}"


def memory(args: argparse.Namespace) -> tuple[Any, str]:
    """Bytes on the fullest device, training or (--kv) serving."""
    from gpt4lib.analysis import memory as m
    from gpt4lib.specs.hardware import DeviceSpec
    from gpt4lib.specs.workload import ParallelPlan
    spec, device = ModelSpec.load(args.model), DeviceSpec.preset(args.device)
    plan = ParallelPlan(tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep, zero_stage=args.zero, micro_batch=args.micro_batch,
                        n_micro_batches=args.n_micro_batches, recompute=args.recompute,
                        sequence_parallel=args.sequence_parallel)
    context = spec.context if args.context is None else args.context
    for name, value in (("--context", context), ("--batch", args.batch)):
        if value < 1:
            raise ValueError(f"{name} {value} is not accepted; give an integer >= 1")
    use = (m.serving(spec, plan, args.batch, context, args.dtype, args.kv_dtype) if args.kv
           else m.training(spec, plan, context, args.dtype, args.gradient_dtype))
    data = {"bytes_per_device": {**use.by_part, "total": use.total}, "fits": use.fits(device)}
    rows = [(part.replace("_", " "), fmt.bytes_si(n), fmt.bytes_iec(n)) for part, n in data["bytes_per_device"].items()]
    verdict = "fits in" if data["fits"] else "does not fit in"
    what = f"serving {args.batch} x {context} tokens" if args.kv else f"training on {context} tokens a sequence"
    return data, (f"{spec.name}, {what}, {plan.n_devices} x {device.name}, the fullest one\n"
                  + fmt.table(rows, ("part", "GB", "GiB"), right=(1, 2))
                  + f"\n{verdict} {fmt.bytes_si(device.memory_bytes)}")


def claims(args: argparse.Namespace) -> tuple[Any, str]:
    """The claims of the notes, recomputed and judged."""
    from gpt4lib import ledger
    if args.id is None:
        found = ledger.load()
        return [ledger.as_json(c) for c in found], ledger.table(found)
    one = ledger.claim(args.id)
    return [ledger.as_json(one)], ledger.detail(one)


def build() -> Parser:
    parser = Parser(prog="gpt4lib", description="What a GPT-4-class model costs: predicted from its description.")
    parser.add_argument("--version", action="version", version=f"gpt4lib {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def command(run, name):
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="machine-readable output, SI units")
        return sub

    model = dict(metavar="MODEL", help="a preset (gpt-4, llama-3.1-8b, ...) or the path of a config.json")
    command(params, "params").add_argument("model", **model)
    sub = command(memory, "memory")
    sub.add_argument("model", **model)
    sub.add_argument("--device", default="a100-80gb", help="a device preset (default: %(default)s)")
    for flag, text in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data"), ("ep", "expert")):
        sub.add_argument(f"--{flag}", type=int, default=1, help=f"{text} parallel degree (default: 1)")
    sub.add_argument("--zero", type=int, default=0, help="ZeRO stage 0-3 (default: 0)")
    sub.add_argument("--micro-batch", type=int, default=1, help="sequences a micro-batch (default: 1)")
    sub.add_argument("--n-micro-batches", type=int, default=1, help="micro-batches a step (default: 1)")
    sub.add_argument("--recompute", default="none", help="none, selective or full (default: none)")
    sub.add_argument("--sequence-parallel", action="store_true", help="also split what tensor parallelism replicates")
    sub.add_argument("--dtype", default="bf16", help="of the weights (default: bf16)")
    sub.add_argument("--gradient-dtype", default="bf16", help="of the gradients (default: bf16)")
    sub.add_argument("--kv", action="store_true", help="serving: weights and KV cache instead of training state")
    sub.add_argument("--kv-dtype", default="bf16", help="of the KV cache (default: bf16)")
    sub.add_argument("--batch", type=int, default=1, help="sequences served together (default: 1)")
    sub.add_argument("--context", type=int, help="tokens a sequence (default: the model's context)")
    command(claims, "claims").add_argument("id", nargs="?", metavar="ID", help="one claim, e.g. A8 (default: all)")
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
        return 0
    except ValueError as error:
        print(f"gpt4lib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:                       # the reader of a pipe left: nothing more to say, also at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
