"""After a build: every page of _toc.yml is there and is not an empty shell."""

import pathlib
import sys

import yaml

ROOT = pathlib.Path(__file__).parents[1]
LEAST_BYTES = 5_000          # the theme's frame alone is larger than any real error page


def pages(toc: dict) -> list[str]:
    """The documents of a table of contents, in reading order."""
    found = [toc[key] for key in ("root", "file") if key in toc]
    for key in ("parts", "chapters", "sections"):
        for entry in toc.get(key, ()):
            found += pages(entry)
    return found


def missing(root: pathlib.Path) -> list[str]:
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    built = [root / "_build" / "html" / (page.removesuffix(".ipynb").removesuffix(".md") + ".html")
             for page in pages(toc)]
    return [str(p.relative_to(root)) for p in built if not p.exists() or p.stat().st_size < LEAST_BYTES]


if __name__ == "__main__":
    if absent := missing(ROOT):
        sys.exit(f"the build left out {', '.join(absent)}")
