"""What must hold for every chapter and page, each check a function that returns what is wrong."""

from __future__ import annotations

import html.parser
import pathlib
import re

WIDEST, LONGEST = 76, 15
FIGURE = ("image/svg+xml", "image/png", "image/jpeg")
# A number that carries weight in prose: grouped or decimal digits, or digits with a unit or a scale.
NUMBER = re.compile(r"(?<![\w.,{^$])\d[\d,]*(?:\.\d+)?(?=\s*(?:%|billion|trillion|million|TFLOP|GB|TB|GPUs|A100|H100)\b|\s*%)"
                    r"|(?<![\w.,^])\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")


def text(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and text(c).strip()]


def was_run_once_in_order(notebook: dict) -> list[str]:
    counts = [c.get("execution_count") for c in code_cells(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def compares_something(notebook: dict) -> list[str]:
    ignored = [c for c in code_cells(notebook) if "nbval-ignore-output" in c["metadata"].get("tags", ())
               or "NBVAL_IGNORE_OUTPUT" in text(c)]
    kept = [c for c in code_cells(notebook) if c["outputs"] and c not in ignored]
    return [f"{len(ignored)} cells ignore their output"] * (len(ignored) > 1) + ["no output is compared"] * (not kept)


def cells_are_clean(notebook: dict) -> list[str]:
    bad = []
    for c in code_cells(notebook):
        source, lines = text(c), text(c).split("\n")
        where = f"cell {lines[0]!r}"
        if source.rstrip().endswith(";"):
            bad.append(f"{where} ends with ';'")
        if re.search(r"^\s*[!%]|https?://|urllib|requests\.", source, re.M):
            bad.append(f"{where} leaves the notebook")
        if re.search(r"['\"](/|~|[A-Z]:\\)", source):
            bad.append(f"{where} holds an absolute path")
        if len(lines) > LONGEST or max(map(len, lines)) > WIDEST:
            bad.append(f"{where} is {len(lines)} lines of up to {max(map(len, lines))} characters")
        if any(o.get("name") == "stderr" for o in c["outputs"]):
            bad.append(f"{where} prints to stderr")
        if "execution" in c["metadata"]:
            bad.append(f"{where} records its timing")
    return bad


def kernel_is_plain(notebook: dict) -> list[str]:
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"the kernel is {name!r}, not python3"]


def figures_are_svg_with_alt(notebook: dict) -> list[str]:
    bad = []
    for c in code_cells(notebook):
        kinds = {k for o in c["outputs"] for k in o.get("data", {}) if k in FIGURE}
        if kinds - {"image/svg+xml"}:
            bad.append(f"cell {text(c)[:40]!r} draws {kinds}: only SVG is compared")
        alt = c["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if kinds and len(alt) < 40:
            bad.append(f"cell {text(c)[:40]!r} has a figure without alt text")
    return bad


def claims_used(notebook: dict) -> set[str]:
    return {i.upper() for c in notebook["cells"] if c["cell_type"] == "markdown"
            for i in re.findall(r"\]\(#claim-([a-z0-9]+)\)", text(c))}


def plain(number: str) -> str:
    return number.replace("{,}", "").replace(",", "")


def spoken(notebook: dict, claims: list[str]) -> str:
    """All text a typed number may come from: code, its outputs, quoted claims, and the claims linked to."""
    parts = list(claims)
    for c in notebook["cells"]:
        if c["cell_type"] == "code":
            parts.append(text(c))
            parts += ["".join(o.get("text", ())) for o in c["outputs"]]
        else:
            parts += [line for line in text(c).split("\n") if line.startswith(">")]
    return "\n".join(parts)


def typed_numbers(notebook: dict, claims: list[str] = ()) -> list[str]:
    """Numbers in prose that no cell computes, no claim states and no quotation holds.

    18,432 may also stand as 18432 in code, and 1.8 trillion as 1.8e12: the digits must be there.
    """
    sources = plain(spoken(notebook, claims))
    found = set(re.findall(r"\d+(?:\.\d+)?", sources))
    bad = []
    for c in notebook["cells"]:
        if c["cell_type"] != "markdown":
            continue
        prose = re.sub(r"<form.*?</form>|```.*?```(?!\{)|`[^`]*`|\{[a-z:]+\}`[^`]*`|\]\([^)]*\)", " ", text(c), flags=re.S)
        prose = "\n".join(line for line in prose.split("\n") if not line.startswith((">", "#")))
        for number in NUMBER.findall(prose):
            value = plain(number)
            rounded = {value, value.rstrip("0") if "." in value else value}
            if not (rounded & found or any(f.startswith(value) and "." in f for f in found)):
                bad.append(number)
    return bad


class Page(html.parser.HTMLParser):
    """The ids, links, images and loaded resources of a built page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids, self.links, self.images, self.loaded = set(), [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append((attrs.get("src", ""), attrs.get("alt", "")))
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("href") and attrs.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loaded.append(attrs["href"])


def external_loads(page: Page) -> list[str]:
    return [src for src in page.loaded if re.match(r"(https?:)?//", src)]


def bare_images(page: Page) -> list[str]:
    return [src for src, alt in page.images if not alt or re.search(r"\.(svg|png|jpe?g)$", alt)]


def broken_links(root: pathlib.Path, where: pathlib.Path, pages: dict[pathlib.Path, Page]) -> list[str]:
    """Internal links of one page whose file or anchor does not exist."""
    bad = []
    for href in pages[where].links:
        if re.match(r"[a-z]+:|//", href) or href == "#":
            continue
        file, _, anchor = href.partition("#")
        target = (where.parent / file.partition("?")[0]).resolve() if file else where
        if not target.exists():
            bad.append(href)
        elif anchor and target in pages and anchor not in pages[target].ids:
            bad.append(href)
    return bad
