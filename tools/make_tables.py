"""Write models.md, hardware.md and the README picture from the presets; run it after changing one.

    python tools/make_tables.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt4lib import format as fmt
from gpt4lib import plotting
from gpt4lib.analysis.memory import kv_cache_bytes
from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import registry
from gpt4lib.specs.hardware import ClusterSpec, DeviceSpec
from gpt4lib.specs.model import ModelSpec

PICTURED = ("gpt-3-175b", "mixtral-8x7b", "gpt-4")
ROOT = Path(__file__).resolve().parent.parent
MARKS = {status: f'<span class="status status-{status}">{sign} {status}</span>'
         for status, sign in zip(registry.STATUSES, "●◐○")}
LEGEND = f"""\
{MARKS["published"]} comes from a paper, a datasheet or the file that ships with the weights,
{MARKS["reported"]} from a leak or the press, unconfirmed;
{MARKS["inferred"]} was solved for in this book. A row carries the weakest mark among its
fields; the fields that stand apart are listed under [sources](#SOURCES).
"""
NOTE = "<!-- written by tools/make_tables.py from gpt4lib/specs/presets; edit those instead -->\n"


def table(header: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    """A Markdown table; the columns in `numbers` are right-aligned."""
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def mark(kind: str, name: str) -> str:
    """The weakest status among an entry's fields."""
    found = {source.status for source in registry.provenance(kind, name).values()}
    return MARKS[max(found, key=registry.STATUSES.index)]


def plain(text: str) -> str:
    """The same words when read as Markdown: no accidental emphasis, no table cell."""
    return text.replace("*", "\\*").replace("_", "\\_").replace("|", "\\|").rstrip(".")


def sources(kind: str) -> str:
    """One paragraph an entry: its main source, then each field that comes from elsewhere."""
    blocks = []
    for name in registry.names(kind):
        by_source: dict[registry.Source, list[str]] = {}
        for field, source in registry.provenance(kind, name).items():
            by_source.setdefault(source, []).append(field)
        main = max(by_source, key=lambda s: (len(by_source[s]), -registry.STATUSES.index(s.status)))
        lines = [f"**{name}**: {MARKS[main.status]}. {plain(main.source)}."]
        lines += [f"- `{'`, `'.join(fields)}`: {MARKS[source.status]}. {plain(source.source)}."
                  for source, fields in by_source.items() if source != main]
        blocks.append("\n".join(lines[:1] + ([""] if len(lines) > 1 else []) + lines[1:]))
    return "\n\n".join(blocks) + "\n"


def ffn(spec: ModelSpec) -> str:
    if not spec.is_moe:
        return f"{spec.d_ff:,}"
    shared = f" + {spec.d_shared:,} shared" if spec.d_shared else ""
    return f"{spec.top_k} of {spec.n_experts} × {spec.d_expert:,}{shared}"


def attention(spec: ModelSpec) -> str:
    if spec.latent:
        return f"{spec.n_heads} heads, latent {spec.latent.kv_rank} + {spec.latent.rope_dim}"
    return f"{spec.n_heads} × {spec.head_dim}, {spec.n_kv_heads} KV"


def models() -> str:
    shapes, counts = [], []
    for name in registry.names("models"):
        spec = ModelSpec.preset(name)
        count = parameters(spec)
        shapes.append([f"`{name}`", f"{spec.n_layers}", f"{spec.d_model:,}", attention(spec),
                       ffn(spec), f"{spec.vocab_size:,}", f"{spec.context:,}"])
        counts.append([f"`{name}`", f"{count.total:,}", f"{count.active:,}",
                       fmt.percent(count.active / count.total),
                       f"{kv_cache_bytes(spec, batch=1, context=1):,.0f}", mark("models", name)])
    return f"""{NOTE}# Model table

Exact parameter counts of every model the library ships, by `gpt4lib.analysis.parameters`. Active is
what the forward pass of one token uses. KV bytes are what one more token of context adds to the
cache, in 2-byte numbers. `gpt4lib params NAME` prints the same by part.

{LEGEND.replace("SOURCES", "model-sources")}
{table(["model", "total", "active", "active / total", "KV bytes / token", "status"], counts,
       {1, 2, 3, 4})}
## Shapes

{table(["model", "layers", "d_model", "query heads × head_dim, KV heads", "feed-forward width",
        "vocabulary", "context"], shapes, {1, 2, 5, 6})}
(model-sources)=
## Sources

{sources("models")}"""


def hardware() -> str:
    rows = []
    for name in registry.names("devices"):
        device = DeviceSpec.preset(name)
        peak = device.peak.get("bf16", device.peak.get("fp16"))
        rows.append([f"`{name}`", mark("devices", name), fmt.bytes_si(device.memory_bytes),
                     f"{fmt.bytes_si(device.memory_bandwidth, 4)}/s",
                     fmt.flop_rate(peak), f"{peak / device.memory_bandwidth:,.0f}",
                     f"{fmt.bytes_si(device.link_bandwidth)}/s", f"{device.power_watts:,.0f} W"])
    formats = list(dict.fromkeys(dtype for name in registry.names("devices")
                                 for dtype in DeviceSpec.preset(name).peak))
    peaks = [[f"`{name}`", *(f"{peak[f] / 1e12:,g}" if f in peak else "–" for f in formats)]
             for name, peak in ((n, DeviceSpec.preset(n).peak) for n in registry.names("devices"))]
    clusters = []
    for name in registry.names("clusters"):
        cluster = ClusterSpec.preset(name)
        network = f"{fmt.bytes_si(cluster.inter_node_bandwidth)}/s"
        clusters.append([f"`{name}`", f"{cluster.n_devices:,}", f"`{cluster.device.name}`",
                         f"{cluster.devices_per_node}", network,
                         mark("clusters", name)])
    return f"""{NOTE}# Hardware table

One accelerator a row: dense peaks (datasheets often print the sparse ones, twice as high), one
direction of its links. The ridge is peak over memory bandwidth in FLOP per byte: work below it
waits for memory.

{LEGEND.replace("SOURCES", "device-sources")}
{table(["device", "status", "memory", "bandwidth", "16-bit peak", "ridge", "links", "power"], rows,
       {2, 3, 4, 5, 6, 7})}
## Dense peaks by number format, in TFLOP/s

{table(["device", *formats], peaks, set(range(1, len(formats) + 1)))}
## Clusters

The network column is one device's share of the links between nodes, one direction.

{table(["cluster", "devices", "of", "per node", "network", "status"], clusters, {1, 3, 4})}
(device-sources)=
## Sources

{sources("devices")}
{sources("clusters")}"""


def picture() -> str:
    """The README's figure: who has how many parameters, and how many a token uses."""
    counts = {name: parameters(ModelSpec.preset(name)) for name in PICTURED}
    label = {name: f"{name}, as reported" if name == "gpt-4" else name for name in counts}
    return plotting.svg(plotting.parameter_bar({label[n]: c.by_part for n, c in counts.items()},
                                               {label[n]: c.active for n, c in counts.items()}))


def main() -> None:
    for name, text in (("models.md", models()), ("hardware.md", hardware()),
                       ("_static/parameters.svg", picture())):
        (ROOT / name).write_text(text, "utf8")
        print(f"wrote {name}")


if __name__ == "__main__":
    sys.exit(main())
