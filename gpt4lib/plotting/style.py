"""One visual language: a hue means the same thing, and a figure is the same bytes, everywhere.

A figure is a bare `matplotlib.figure.Figure` (pyplot is never involved): make it the last line of
a cell. Text stays text in the SVG, measured with the font that ships with matplotlib, and the axes
are placed in inches: nothing depends on the fonts of the machine that draws.
"""

import functools
import io
from typing import Callable, Sequence

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from gpt4lib import format as fmt
from gpt4lib.specs import registry

TABLE = registry.read("gpt4lib.plotting", "style.toml")
COLORS = TABLE["colors"]            # a meaning -> its hue
ATTENTION, EXPERTS = COLORS["weights"], "#5a90ee"   # two shades of weights, never of anything else
PASSES = {"F": ("#a9924a", "#9b9176"), "B": ("#795f09", "#6e664a")}    # tones of compute; even and odd chunks
GREY = "#797b80"        # text and axes: 4.2:1 on white, 4.4:1 on #121212; 4.33 is the best for both
WIDTH = 5.2             # inches: 500 CSS px, so text of 12 pt is 16 px there and 11 px at 350 px
TEXT = 12.0             # points; the smallest text any figure may use
DOTTED = {"color": GREY, "linewidth": 1.2, "linestyle": (0, (1, 2))}      # a line that is no curve: a target, a limit

RC = {
    **TABLE["rc"], "figure.figsize": (WIDTH, 3.0), "savefig.bbox": None,
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize"), TEXT),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "axes.prop_cycle": cycler(color=[COLORS[m] for m in COLORS if m != "failure"]),
}
SAVE = {"format": "svg", "metadata": {"Date": None, "Creator": None}, "bbox_inches": None}


def use() -> None:
    """Set the style for this process, and inside Jupyter show figures as reproducible SVG."""
    matplotlib.rcParams.update(RC)
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
        set_matplotlib_formats("svg", metadata=SAVE["metadata"], bbox_inches=None)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a chart so that it looks the same whether or not `use()` was called."""
    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)
    return wrapper


def canvas(height: float, left: float = 0.6, right: float = 0.15, bottom: float = 0.5, top: float = 0.15) -> tuple[Figure, Axes]:
    """An empty figure of the common width with one axes; lengths and margins in inches."""
    figure = Figure(figsize=(WIDTH, height))
    width, inside = (WIDTH - left - right) / WIDTH, (height - bottom - top) / height
    return figure, figure.add_axes((left / WIDTH, bottom / height, width, inside))


def on_fill(color: str) -> str:
    """Black or white, whichever reads better on a filled mark of this colour (WCAG 2 contrast)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def short(value: float) -> str:
    """A count without trailing zeros, for axes and targets: 55 G, 1 T."""
    number, _, unit = fmt.count(value).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def ticks(axis: Axis, values: Sequence[float], show: Callable[[float], str] = short) -> None:
    """Ticks at exactly these values, written by `show`."""
    axis.set_ticks(values, [show(value) for value in values])
    axis.set_ticks([], minor=True)


def svg(figure: Figure) -> str:
    """The figure as SVG text: equal figures give equal text, in any process."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, **SAVE)
    return buffer.getvalue()
