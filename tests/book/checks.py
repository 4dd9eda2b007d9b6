"""What must hold for every chapter and page, each check a function that returns what is wrong."""

from __future__ import annotations

import html.parser
import pathlib
import re
import urllib.parse

WIDEST, LONGEST = 76, 15
FIGURE = ("image/svg+xml", "image/png", "image/jpeg")
NETWORK = r"^\s*[!%]|https?://|\b(?:import|from)\s+(?:urllib|http|socket|requests|httpx|ftplib)\b|get_ipython|os\.system"
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
MACHINE = r"/(?:home|root|tmp|Users)/|\bat 0x[0-9a-f]{6,}"        # what differs on the next machine


def text(cell: dict) -> str:
    return "".join(cell["source"])


def printed(cell: dict) -> str:
    return "\n".join("".join(o.get("text", ())) + "".join(o.get("data", {}).get("text/plain", ())) for o in cell["outputs"])


def code_cells(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and text(c).strip()]


def was_run_once_in_order(notebook: dict) -> list[str]:
    counts = [c.get("execution_count") for c in code_cells(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def compares_something(notebook: dict) -> list[str]:
    ignored = [c for c in code_cells(notebook) if UNCOMPARED & set(c["metadata"].get("tags", ()))
               or re.search("NBVAL_(IGNORE_OUTPUT|SKIP)", text(c))]
    kept = [c for c in code_cells(notebook) if c["outputs"] and c not in ignored]
    return [f"{len(ignored)} cells ignore their output"] * (len(ignored) > 1) + ["no output is compared"] * (not kept)


def cells_are_clean(notebook: dict) -> list[str]:
    bad = []
    for c in code_cells(notebook):
        source, lines = text(c), text(c).split("\n")
        where = f"cell {lines[0]!r}"
        if source.rstrip().endswith(";"):
            bad.append(f"{where} ends with ';'")
        if re.search(NETWORK, source, re.M):
            bad.append(f"{where} leaves the notebook")
        if re.search(r"['\"](/|~|\.\./|[A-Z]:\\)", source):
            bad.append(f"{where} holds a path that another machine or folder lacks")
        if re.search(MACHINE, printed(c)):
            bad.append(f"{where} prints a path or an address of this machine")
        if len(lines) > LONGEST or max(map(len, lines)) > WIDEST:
            bad.append(f"{where} is {len(lines)} lines of up to {max(map(len, lines))} characters")
        if any(o.get("name") == "stderr" for o in c["outputs"]):
            bad.append(f"{where} prints to stderr")
        if "execution" in c["metadata"]:
            bad.append(f"{where} records its timing")
    return bad


def metadata_is_plain(notebook: dict) -> list[str]:
    """Nothing that names the author's machine: kernel python3, no Python version, one stable id a cell."""
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    bad = [] if name == "python3" else [f"the kernel is {name!r}, not python3"]
    if "version" in notebook["metadata"].get("language_info", {}):
        bad.append("the Python version is recorded; run make outputs")
    ids = [c.get("id") for c in notebook["cells"]]
    return bad + ["cell ids are missing or repeated"] * (None in ids or len(set(ids)) < len(ids))


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
    """Ids of the claims that prose links to, or names as in "claim A1"."""
    prose = "\n".join(text(c) for c in notebook["cells"] if c["cell_type"] == "markdown")
    return set(re.findall(r"\]\([^)\s]*#claim-([\w]+)\)", prose)) | set(
        i.lower() for i in re.findall(r"\bclaims?\s+([A-Z]\d+[a-z]?)\b", prose))


def unknown_claims(notebook: dict, known: list[str]) -> list[str]:
    return sorted(claims_used(notebook) - {i.lower() for i in known})


class Page(html.parser.HTMLParser):
    """The ids, links, images and loaded resources of a built page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids, self.links, self.images, self.loaded = set(), [], [], []
        self._raw = None                    # inside <script> or <style>
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append((attrs.get("src", ""), attrs.get("alt", "")))
        if tag == "link" and attrs.get("href") and attrs.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loaded.append(attrs["href"])
        self.loaded += [attrs[k] for k in ("src", "poster", "data", "srcset") if attrs.get(k)]
        self.loaded += addresses(attrs.get("style") or "")
        self._raw = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if self._raw:
            self.loaded += addresses(data)


def addresses(source: str) -> list[str]:
    """Absolute addresses in a stylesheet or an inline script; an XML namespace is a name, not an address."""
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    return re.findall(r"""(?:url\(|@import|["'`])\s*["']?((?:https?:)?//(?!www\.w3\.org/)[^"'`)\s]+)""", source)


def external_loads(page: Page) -> list[str]:
    return [src for src in page.loaded if re.match(r"(https?:)?//", src)]


def bare_images(page: Page) -> list[str]:
    return [src for src, alt in page.images if not alt or re.search(r"\.(svg|png|jpe?g)$", alt)]


def broken_links(where: pathlib.Path, pages: dict[pathlib.Path, Page]) -> list[str]:
    """Internal links of one page whose file or anchor does not exist."""
    bad = []
    for href in pages[where].links:
        if re.match(r"[a-z]+:|//", href) or href == "#":
            continue
        file, _, anchor = urllib.parse.unquote(href).partition("#")
        target = (where.parent / file.partition("?")[0]).resolve() if file else where
        if not target.exists():
            bad.append(href)
        elif anchor and target in pages and anchor not in pages[target].ids:
            bad.append(href)
    return bad
