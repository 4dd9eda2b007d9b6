"""Every figure of the book: drawn from the object it shows, in one visual language."""

from gpt4lib.plotting.architecture import block_diagram, parameter_bar
from gpt4lib.plotting.attention import head_sharing
from gpt4lib.plotting.curves import active_total, dots, shape_map
from gpt4lib.plotting.lines import lines
from gpt4lib.plotting.pipeline import pipeline
from gpt4lib.plotting.serving import timeline
from gpt4lib.plotting.style import COLORS, svg, use

__all__ = ["COLORS", "active_total", "block_diagram", "dots", "head_sharing", "lines", "parameter_bar", "pipeline", "shape_map",
           "svg", "timeline", "use"]
