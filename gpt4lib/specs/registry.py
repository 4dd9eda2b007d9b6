"""The tables in TOML; among them the presets, models, devices and clusters, each number with its source and status."""

import tomllib
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

STATUSES = ("published", "reported", "inferred")


class Source(NamedTuple):
    """Where a number comes from: `status` is published (paper, datasheet), reported (rumour, leak,
    press) or inferred (solved for here)."""
    status: str
    source: str


@lru_cache(maxsize=None)
def read(package: str, file: str) -> dict[str, Any]:
    """A TOML file that lies in a package of the library; shared, so not to be changed."""
    return tomllib.loads(resources.files(package).joinpath(file).read_text("utf8"))


def names(kind: str) -> tuple[str, ...]:
    """The preset names of a kind ("models", "devices", "clusters"), in the order of the file."""
    return tuple(read("gpt4lib.specs", f"presets/{kind}.toml"))


def _table(kind: str, name: str) -> dict[str, Any]:
    tables = read("gpt4lib.specs", f"presets/{kind}.toml")
    if name not in tables:
        raise ValueError(f"{kind.removesuffix('s')} {name!r} is not a preset; accepted: {', '.join(tables)}")
    return tables[name]


def load(kind: str, name: str) -> dict[str, Any]:
    """The plain values of one preset, without their sources."""
    return {key: value for key, value in _table(kind, name).items() if key != "source"}


def provenance(kind: str, name: str) -> dict[str, Source]:
    """field -> Source for every field of a preset.

    In the file, `[NAME.source]` holds `status` and `text` for the whole entry and
    `[NAME.source.FIELD]` the same two for a field that comes from elsewhere.
    """
    source = _table(kind, name)["source"]
    whole = Source(source["status"], source["text"])
    special = {field: Source(s["status"], s["text"]) for field, s in source.items() if isinstance(s, dict)}
    return {field: special.get(field, whole) for field in load(kind, name)}
