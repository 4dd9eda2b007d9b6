"""Measurements recorded by `benchmarks/`, with the machine and date they belong to; chapters quote these files."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def load(name: str) -> dict:
    """results/NAME.json. Raises ValueError, one line, naming the recordings there are, or where they should be."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise ValueError(f"recording {name!r} does not exist; " + (
            f"accepted: {known}" if known else "recordings come with the repository: install it with pip install -e ."))
    return json.loads(path.read_text("utf8"))


def where(recording: dict) -> str:
    """One line: the processor, its threads and the date."""
    machine, shape = recording["machine"], recording.get("shape", {})
    device = shape.get("device", "cpu")
    name = machine["cpu"] if device == "cpu" else device
    return f"{name}, {shape.get('threads', machine['cores'])} threads, {shape.get('dtype', 'float32')}, {machine['date']}"
