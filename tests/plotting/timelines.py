"""What the figures with one row a stage or a seat have in common, read back from the drawing."""

from matplotlib.patches import Rectangle
from matplotlib.text import Text

from gpt4lib.plotting import style


def blocks(figure):
    """gid -> rectangle, without the grey of idle time."""
    return {a.get_gid(): a for a in figure.findobj(Rectangle) if a.get_gid() and not a.get_gid().startswith("idle")}


def texts(figure):
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def assert_legible(figure):
    """Text is large enough and on the canvas, and the number in a block stays in it."""
    assert figure.get_figwidth() == style.WIDTH and figure.axes[0].get_legend() is None
    assert min(t.get_fontsize() for t in texts(figure)) >= style.TEXT
    box, homes = figure.bbox, [b.get_window_extent() for b in blocks(figure).values()]
    for text in texts(figure):
        seen = text.get_window_extent()
        assert box.x0 - 1 <= seen.x0 and seen.x1 <= box.x1 + 1 and box.y0 - 1 <= seen.y0 and seen.y1 <= box.y1 + 1, text
        if text.get_text().isdigit() and text.get_color() in ("#000000", "#ffffff"):
            assert any(b.x0 - 1 <= seen.x0 and seen.x1 <= b.x1 + 1 for b in homes), text
