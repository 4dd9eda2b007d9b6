"""Pictures of a model's shape: where the parameters sit, and what one layer looks like."""

from typing import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from gpt4lib import format as fmt
from gpt4lib.plotting import style
from gpt4lib.specs.model import ModelSpec

PART_COLORS = {"attention": style.ATTENTION, "experts": style.EXPERTS, "ffn": style.EXPERTS}
MIDDLE = {"ha": "center", "va": "center_baseline"}
ARROW = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}


@style.styled
def parameter_bar(models: Mapping[str, Mapping[str, int]], active: Mapping[str, int] | None = None) -> Figure:
    """Horizontal stacked bars, one per model: parts in order, each labelled in or under the bar.

    models: name -> {part: parameters}, e.g. `{"GPT-4": parameters(spec).by_part}`.
    active: name -> parameters one token uses, a thin second bar; None = not drawn.
    Parts below 1 % of their model are drawn but not labelled.
    Raises ValueError when there is nothing to draw.
    """
    if not models or any(sum(parts.values()) <= 0 for parts in models.values()):
        raise ValueError(f"models={dict(models)!r} holds nothing to draw; give {{name: {{part: parameters}}}}")
    longest = max(sum(parts.values()) for parts in models.values())
    figure, axes = style.canvas(1.42 * len(models), left=0.05, right=0.05, bottom=0.02, top=0.02)
    axes.set(xlim=(0, longest), ylim=(len(models), 0))
    axes.set_axis_off()
    for row, (name, parts) in enumerate(models.items()):
        total = sum(parts.values())
        axes.text(0, row + 0.18, f"{name}: {fmt.count(total)}", weight="bold", ha="left", va="baseline")
        start, outside = 0, []
        for part, count in parts.items():
            color = PART_COLORS.get(part, style.GREY)
            axes.add_patch(Rectangle((start, row + 0.25), count, 0.25, facecolor=color, gid=f"{row}:{part}"))
            label = f"{part.replace('_', ' ')} {fmt.count(count)}"
            if count > longest * 0.02 * len(label):
                axes.text(start + count / 2, row + 0.375, label, color=style.on_fill(color), **MIDDLE)
            elif count > total / 100:
                outside.append(label)
            start += count
        axes.text(0, row + 0.64, ", ".join(outside), ha="left", va="baseline")
        if active and name in active:
            _active_bar(axes, row, active[name], longest)
    return figure


def _active_bar(axes, row: int, active: int, longest: int) -> None:
    """A thin bar as long as the parameters one token uses, named beside it or, if long, inside."""
    color, label = style.COLORS["compute"], f"one token uses {fmt.count(active)}"
    axes.add_patch(Rectangle((0, row + 0.71), active, 0.19, facecolor=color, gid=f"{row}:active"))
    if active > longest / 2:
        axes.text(active / 2, row + 0.805, label, color=style.on_fill(color), **MIDDLE)
    else:
        axes.text(active + 0.01 * longest, row + 0.805, label, color=style.GREY, ha="left", va="center_baseline")


@style.styled
def block_diagram(spec: ModelSpec, layer: int = 0) -> Figure:
    """One layer of a model, drawn from its spec: attention, then feed-forward block or experts.

    Widths are labelled in channels; of the experts, `top_k` are lit, as for one token.
    """
    moe = spec.is_moe_layer(layer)
    figure, axes = style.canvas(3.9, left=0.05, right=0.05, bottom=0.05, top=0.05)
    axes.set(xlim=(0, 100), ylim=(8, 84))
    axes.set_axis_off()
    _arrow(axes, 50, 84, 75, f"one token: {spec.d_model:,} channels", "activations")
    for x, (above, below), color in zip((2, 52), _attention_words(spec), (style.ATTENTION, style.COLORS["kv_cache"])):
        _box(axes, x, 62, 46, 13, above, color, below)
    _arrow(axes, 50, 62, 52 if moe else 46, f"back to {spec.d_model:,}", "activations")
    if moe:
        _box(axes, 22, 43, 56, 9, f"router picks {spec.top_k} of {spec.n_experts}", style.COLORS["compute"])
        _experts(axes, spec)
        caption = f"each expert {spec.d_model:,} → {spec.d_expert:,} → {spec.d_model:,}"
    else:
        _box(axes, 2, 27, 96, 19, "feed-forward", style.EXPERTS, f"{spec.d_model:,} → {spec.d_ff:,} → {spec.d_model:,}")
        caption = "every token uses all of it"
    axes.text(50, 18.5, caption, ha="center", va="baseline")
    axes.text(50, 10.5, f"× {spec.n_layers} layers", ha="center", va="baseline", weight="bold")
    return figure


def _attention_words(spec: ModelSpec) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the query box and the key/value box say: how many heads, and their width together."""
    query = spec.head_dim
    if spec.latent:
        query, rope, rank = spec.latent.nope_dim + spec.latent.rope_dim, spec.latent.rope_dim, spec.latent.kv_rank
        cached = "1 latent vector", f"{rank} + {rope} = {rank + rope}"
    else:
        cached = (f"{spec.n_kv_heads} key/value head{'s' if spec.n_kv_heads > 1 else ''}", f"× {query} = {spec.kv_width:,}")
    return (f"{spec.n_heads} query heads", f"× {query} = {spec.n_heads * query:,}"), cached


def _box(axes, x: float, y: float, width: float, height: float, text: str, color: str, below: str = "") -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.5",
                                  facecolor=color, edgecolor="none"))
    for words, shift in ((text, 2.6 if below else 0), (below, -3.4)):
        if words:
            axes.text(x + width / 2, y + height / 2 + shift, words, color=style.on_fill(color), **MIDDLE)


def _arrow(axes, x: float, top: float, bottom: float, label: str, kind: str) -> None:
    color = style.COLORS[kind]
    axes.annotate("", (x, bottom), (x, top), arrowprops={**ARROW, "color": color, "lw": 2})
    axes.text(x + 2.5, (top + bottom) / 2, label, ha="left", va="center_baseline")


def _experts(axes, spec: ModelSpec) -> None:
    """A grid of boxes; the lit ones are spread so that the choice looks like one."""
    n = spec.n_experts
    per_row = min(n, 16 if n <= 64 else 32)
    rows = -(-n // per_row)
    every = n // spec.top_k
    lit = {i * every + (every // 2 if rows == 1 else 11 * i % every) for i in range(spec.top_k)}
    step, height = 96 / per_row, 11 / rows
    for i in range(n):
        x, y = 2 + (i % per_row) * step, 35.5 - (i // per_row + 1) * height
        axes.add_patch(Rectangle((x + 0.08 * step, y + 0.05 * height), 0.84 * step, 0.9 * height,
                                 gid=f"expert:{i}", facecolor=style.EXPERTS if i in lit else "none",
                                 edgecolor=style.EXPERTS, linewidth=1.2 if rows == 1 else 0.8))
        if i in lit and rows == 1:
            axes.annotate("", (x + step / 2, y + height), (50, 43),
                          arrowprops={**ARROW, "color": style.COLORS["compute"], "lw": 1.5})
    if rows > 1:
        _arrow(axes, 50, 43, 35.5, "", "compute")
