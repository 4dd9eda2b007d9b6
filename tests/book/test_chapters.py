"""The chapters as committed: run in order, clean, drawn in SVG with alt text, no number typed."""

import copy
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checks  # noqa: E402

from gpt4lib import ledger  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
CHECKS = (checks.was_run_once_in_order, checks.compares_something, checks.cells_are_clean, checks.kernel_is_plain,
          checks.figures_are_svg_with_alt)


def read(path):
    return json.loads(path.read_text("utf8"))


def stated(ids):
    """What the linked claims say, as text that numbers may be quoted from."""
    return [f"{c.en} {ledger.detail(c)}" for c in map(ledger.claim, ids)]


def test_there_are_chapters():
    assert CHAPTERS


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_chapter(chapter, check):
    assert check(read(chapter)) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_every_claim_a_chapter_links_to_exists(chapter):
    used = checks.claims_used(read(chapter))
    assert used and used <= {c.id.upper() for c in ledger.load()}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_no_number_is_typed_into_prose(chapter):
    notebook = read(chapter)
    assert checks.typed_numbers(notebook, stated(checks.claims_used(notebook))) == []


# --- each check can fail ---------------------------------------------------------------------------------
def notebook(source="print(1)", markdown="", outputs=None, **metadata):
    outputs = [{"output_type": "stream", "name": "stdout", "text": ["12,345 and 1.5\n"]}] if outputs is None else outputs
    return {"metadata": {"kernelspec": {"name": "python3"}},
            "cells": [{"cell_type": "markdown", "metadata": {}, "source": [markdown]},
                      {"cell_type": "code", "metadata": metadata, "execution_count": 1, "source": [source],
                       "outputs": outputs}]}


SVG = [{"output_type": "execute_result", "data": {"image/svg+xml": ["<svg/>"]}}]
ALT = {"image": {"alt": "a sentence long enough to say what the figure shows"}}


def test_the_made_up_notebook_passes():
    for check in CHECKS:
        assert check(notebook()) == [] and check(notebook(outputs=SVG, mystnb=ALT)) == []


@pytest.mark.parametrize("check, bad", [
    (checks.compares_something, notebook(outputs=[])),
    (checks.cells_are_clean, notebook("ax.plot(x);")), (checks.cells_are_clean, notebook("!pip install x")),
    (checks.cells_are_clean, notebook("open('/etc/passwd')")), (checks.cells_are_clean, notebook("x" * 77)),
    (checks.cells_are_clean, notebook("x\n" * 16)), (checks.cells_are_clean, notebook(execution={"t": 1})),
    (checks.cells_are_clean, notebook(outputs=[{"output_type": "stream", "name": "stderr", "text": "w"}])),
    (checks.figures_are_svg_with_alt, notebook(outputs=SVG)),
    (checks.figures_are_svg_with_alt, notebook(outputs=[{"data": {"image/png": "x"}}], mystnb=ALT)),
])
def test_a_planted_fault_is_found(check, bad):
    assert check(bad)


def test_a_stripped_or_shuffled_notebook_is_found():
    bad = copy.deepcopy(notebook())
    bad["cells"][1]["execution_count"] = None
    assert checks.was_run_once_in_order(bad)


@pytest.mark.parametrize("prose, found", [
    ("a wall of 54,321 bricks", ["54,321"]), ("it costs 1.7 billion", ["1.7"]), ("saves 37 %", ["37"]),
    ("a wall of 12,345 bricks", []), ("it costs 1.5 billion", []), ("chapter 3 and 16 experts", []),
    ("> quoted: 99 billion", [])])
def test_a_typed_number_is_found_and_a_computed_one_is_not(prose, found):
    assert checks.typed_numbers(notebook(markdown=prose)) == found


def test_a_claim_may_be_quoted():
    assert checks.typed_numbers(notebook(markdown="63 million"), ["it costs 63 million"]) == []
