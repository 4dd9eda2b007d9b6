"""The chapters as committed: run in order, clean, drawn in SVG with alt text, no number typed."""

import json
import pathlib
import sys

import nbformat
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checks  # noqa: E402
import numbers_in_prose  # noqa: E402

from gpt4lib import ledger  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
CHECKS = (checks.was_run_once_in_order, checks.compares_something, checks.cells_are_clean, checks.metadata_is_plain,
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
    notebook = read(chapter)
    assert checks.claims_used(notebook)
    assert checks.unknown_claims(notebook, [c.id for c in ledger.load()]) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_is_a_valid_notebook_with_cell_ids(chapter):
    notebook = nbformat.read(chapter, as_version=nbformat.NO_CONVERT)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_no_number_is_typed_into_prose(chapter):
    notebook = read(chapter)
    assert numbers_in_prose.typed_numbers(notebook, stated(checks.claims_used(notebook))) == []


# --- each check can fail ---------------------------------------------------------------------------------
def notebook(source="print(1)", markdown="", outputs=None, **metadata):
    outputs = [{"output_type": "stream", "name": "stdout", "text": ["12,345 and 1.5\n"]}] if outputs is None else outputs
    return {"metadata": {"kernelspec": {"name": "python3"}},
            "cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": [markdown]},
                      {"cell_type": "code", "id": "b", "metadata": metadata, "execution_count": 1, "source": [source],
                       "outputs": outputs}]}


SVG = [{"output_type": "execute_result", "data": {"image/svg+xml": ["<svg/>"]}}]
ALT = {"image": {"alt": "a sentence long enough to say what the figure shows"}}


def test_the_made_up_notebook_passes():
    for check in CHECKS:
        assert check(notebook()) == [] and check(notebook(outputs=SVG, mystnb=ALT)) == []


@pytest.mark.parametrize("check, bad", [
    (checks.compares_something, notebook(outputs=[])),
    (checks.cells_are_clean, notebook("ax.plot(x);")), (checks.cells_are_clean, notebook("!pip install x")),
    (checks.compares_something, notebook(tags=["nbval-skip"])), (checks.compares_something, notebook("# NBVAL_SKIP")),
    (checks.cells_are_clean, notebook("import socket")), (checks.cells_are_clean, notebook("x = 'https://a.example'")),
    (checks.cells_are_clean, notebook("open('../data')")), (checks.cells_are_clean, notebook("open('/etc/passwd')")),
    (checks.cells_are_clean, notebook(outputs=[{"output_type": "execute_result",
                                                "data": {"text/plain": "<Axes at 0x7f00aa11>"}}])),
    (checks.cells_are_clean, notebook("x" * 77)),
    (checks.cells_are_clean, notebook("x\n" * 16)), (checks.cells_are_clean, notebook(execution={"t": 1})),
    (checks.cells_are_clean, notebook(outputs=[{"output_type": "stream", "name": "stderr", "text": "w"}])),
    (checks.figures_are_svg_with_alt, notebook(outputs=SVG)),
    (checks.figures_are_svg_with_alt, notebook(outputs=[{"data": {"image/png": "x"}}], mystnb=ALT)),
])
def test_a_planted_fault_is_found(check, bad):
    assert check(bad)


def test_a_stripped_or_shuffled_notebook_is_found():
    bad = notebook()
    bad["cells"][1]["execution_count"] = None
    assert checks.was_run_once_in_order(bad)


@pytest.mark.parametrize("spoil", [
    lambda n: n["metadata"]["kernelspec"].update(name="my-venv"),
    lambda n: n["metadata"].update(language_info={"name": "python", "version": "3.11.7"}),
    lambda n: n["cells"][1].update(id="a"), lambda n: n["cells"][1].pop("id")])
def test_metadata_of_one_machine_is_found(spoil):
    bad = notebook()
    spoil(bad)
    assert checks.metadata_is_plain(bad)


@pytest.mark.parametrize("prose, unknown", [("[A1](#claim-a1)", []), ("[Z9](#claim-z9)", ["z9"]), ("as claim Z9 says", ["z9"]),
                                            ("[Z9](../claims.md#claim-z9)", ["z9"]), ("claims that A1 makes", [])])
def test_a_claim_nobody_made_is_found(prose, unknown):
    assert checks.unknown_claims(notebook(markdown=prose), ["A1", "A5a"]) == unknown


# The made-up notebook computes 12,345 and 1.5.
@pytest.mark.parametrize("prose, found", [
    ("a wall of 54,321 bricks", ["54,321"]), ("it costs 1.7 billion", ["1.7 billion"]), ("saves 37 %", ["37 %"]),
    ("holds 55.8 B", ["55.8 B"]), ("1 trillion", ["1 trillion"]), ("3.9 GiB, 61,440 B", ["3.9 GiB", "61,440 B"]),
    ("for \\$63", ["\\$63"]), ("$d = 10{,}752$", ["10{,}752"]), ("7.77e12", ["7.77e12"]), ("2.5 days", ["2.5 days"]),
    ("# A heading of 99 billion", ["99 billion"]), ("it is {cite}`x` 7.7 GB. It is 8.8 GB.", ["8.8 GB"]),
    ("a wall of 12,345 bricks", []), ("it costs 1.5 billion", []), ("12.3 thousand", []), ("chapter 3 and 16 experts", []),
    ("see Table 4.2", []), ("**1.1 [A problem]**", []), ("> quoted: 99 billion", []), ("`77,777`", [])])
def test_a_typed_number_is_found_and_a_computed_one_is_not(prose, found):
    assert numbers_in_prose.typed_numbers(notebook(markdown=prose)) == found


def test_alt_text_is_prose_and_comments_compute_nothing():
    alt = {"image": {"alt": "a bar of 77.7 billion"}}
    assert numbers_in_prose.typed_numbers(notebook("f()  # 77.7 billion", mystnb=alt)) == ["77.7 billion"]
    assert numbers_in_prose.typed_numbers(notebook("f(77.7e9)", mystnb=alt)) == []


def test_a_claim_may_be_quoted():
    assert numbers_in_prose.typed_numbers(notebook(markdown="63 million"), ["it costs 63 million"]) == []
