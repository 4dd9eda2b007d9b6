"""The ledger: complete, computed, and honest about why a claim fails."""

import json
import math
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpt4lib import ledger
from gpt4lib.ledger.claims import KINDS, Figure, figures
from gpt4lib.ledger.intervals import evaluate, names, rounding
from gpt4lib.ledger.judge import judge, power_of_ten, relative_error

ROOT = Path(__file__).parents[2]

COUNTS = {"T": 8, "K": 12, "O": 8, "A": 8, "D": 6, "P": 6, "C": 6, "M": 4, "I": 14, "IC": 5,
          "Q": 4, "B": 3, "S": 10, "V": 6, "N": 2, "X": 5, "G": 15}  # fmt: skip
IDS = [f"{s}{n}" for s, count in COUNTS.items() for n in range(1, count + 1)]
IDS = [i for i in IDS if i != "A5"] + ["A5a", "A5b"]  # A5 is two statements


def verdict(id: str) -> str:
    return judge(ledger.claim(id)).verdict


def restated(id: str, name: str, value, unit: str) -> ledger.Claim:
    """Return a claim with one of its figures changed."""
    claim = ledger.claim(id)
    figure, _ = Figure.parse(value, unit)
    return replace(
        claim,
        quantities=tuple(
            replace(q, figure=figure) if q.name == name else q for q in claim.quantities
        ),
    )


def test_every_row_of_the_notes_is_here_once():
    ids = [c.id for c in ledger.load()]
    assert sorted(ids) == sorted(IDS)
    assert len(ids) == len(set(ids)) == 123


def test_stated_figures_are_those_of_the_chinese_text():
    """Parse 180万亿, 2150 万, 130B, 8k ...: what is stated in SI is what the fragment says."""
    scales = {"万亿": 1e12, "亿": 1e8, "万": 1e4, "B": 1e9, "TFLOPs": 1e12, "GB": 1e9, "TB": 1e12,
              "k": 1024, "%": 0.01, "": 1}  # fmt: skip
    units = {"s": 86400, "USD/s": 1 / 3600, "USD/token": 1e-5}
    # Figures the sentence holds only by meaning: none at all, or those of the sentence before.
    elsewhere = {"O8", "S2", "A7", "I4"}
    pattern = r"(\d+(?:\.\d+)?(?:e\d+)?)\s?(万亿|亿|万|TFLOPs|GB|TB|B|k|%)?"
    compared = 0
    for c in ledger.load():
        said = [float(n) * scales[s] for n, s in re.findall(pattern, c.zh)]
        for q in c.quantities:
            ends = {x for x in q.figure.nominal if math.isfinite(x)}
            comparison = ends == {1.0} and not math.isfinite(sum(q.figure.nominal))
            if comparison or c.id in elsewhere or c.id in ("O2", "Q3") and "memory" != q.name:
                continue
            for x in ends:
                printed = x / units.get(q.unit, 1)
                # 1e-9: the unit factors are not exact in binary.
                assert any(abs(printed - y) <= 1e-9 * abs(y) for y in said), (c.id, q.name, x)
                compared += 1
    assert compared > 50


def test_rows_are_filled():
    for c in ledger.load():
        assert c.zh and c.en and c.section and c.kind in KINDS, c.id
        assert any("\u4e00" <= ch <= "\u9fff" for ch in c.zh) or c.zh.startswith(
            ("http", "约 560")
        ), c.id
        assert 1 <= c.chapter <= 12, c.id
        assert c.status in ("published", "reported", "inferred"), c.id


def test_a_quantity_row_has_something_to_compute():
    for c in ledger.load():
        if c.kind == "quantity":
            bound = [i for i in c.implies if i.band or i.limit or i.whole]
            assert bound or any(q.follows for q in c.quantities), c.id


def test_every_expression_evaluates_over_known_figures():
    known = figures()
    for c in ledger.load():
        expressions = [q.follows for q in c.quantities if q.follows]
        expressions += [e for i in c.implies for e in (i.follows, i.band, i.limit) if e]
        expressions += [e for r in c.readings for _, e in r.follows]
        for expression in expressions:
            low, high = evaluate(expression, known.lookup(wide=True))
            near = evaluate(expression, known.lookup(wide=False))
            # What was printed lies among all it can stand for.
            assert low <= near[0] <= near[1] <= high, (c.id, expression)


def test_no_figure_is_compared_with_itself():
    for c in ledger.load():
        for q in c.quantities:
            assert not (q.follows and q.symbol and q.symbol in names(q.follows)), (c.id, q.name)


def test_symbols_and_reading_names_are_good():
    claims = ledger.load()
    symbols = [q.symbol for c in claims for q in c.quantities if q.symbol]
    assert len(symbols) == len(set(symbols))
    assert not set(symbols) & (set(figures().constants) | set(figures().derived))
    for c in claims:
        stated = {q.name for q in c.quantities}
        for r in c.readings:
            assert {name for name, _ in r.follows} | ({r.quantity} - {None}) <= stated, c.id


# id, figure, recomputed by hand, words the diagnosis must hold
FAILURES = [
    ("T3", "parameters", 1.831e12, "×100"),
    ("K4", "active parameters", 2.77e11, "÷10"),
    ("A5b", "FLOP per token", 5.54e11, "×1,000"),
    ("A6", "FLOP per token", 3.662e12, "×1,000"),
    ("O8", "share of parameters active", 277 / 1831, "not every parameter"),
    ("I9", "KV cache", 2 * 120 * 1 * 128 * 512 * 2048 * 2, "wrong subject: holds for PaLM 540B"),
    ("I13", "weights per GPU", 2 * 130e9 / 8, "I12"),
    ("I14", "weights per GPU", 130e9 / 8, "I12"),
]


@pytest.mark.parametrize("id, name, by_hand, words", FAILURES)
def test_inconsistent_rows_by_hand(id, name, by_hand, words):
    outcome = judge(ledger.claim(id))
    check = next(c for c in outcome.checks if c.quantity.name == name)
    # 1e-12: the same few multiplications in another order.
    assert check.recomputed == pytest.approx((by_hand, by_hand), rel=1e-12)
    assert outcome.verdict == "inconsistent"
    assert words in outcome.diagnosis


def test_training_money_needs_105_days():
    outcome = judge(ledger.claim("C4"))
    cost = outcome.checks[0]
    assert cost.recomputed == pytest.approx((54e6, 60e6), rel=1e-12)
    assert cost.relative_error == pytest.approx(0.05, rel=1e-9)
    assert outcome.verdict == "inconsistent" and "C2" in outcome.diagnosis
    needed = outcome.implied[0].value[0]
    assert needed / 86400 == pytest.approx(105, rel=1e-12)


@pytest.mark.parametrize("id, mfu, in_dollars", [("IC2", 10.07, 0.1007), ("IC3", 14.81, 0.1481)])
def test_cents_are_impossible_and_dollars_are_not(id, mfu, in_dollars):
    outcome = judge(ledger.claim(id))
    assert outcome.verdict == "inconsistent"
    # Four printed digits: half a unit of the last.
    assert outcome.implied[0].value[0] == pytest.approx(mfu, abs=0.005)
    assert "impossible" in outcome.diagnosis
    assert f"dollars (MFU: {100 * in_dollars:.2f} %)" in outcome.diagnosis


def test_node_is_too_heavy():
    outcome = judge(ledger.claim("I12"))
    mean, eight_layers = 1.831e12 / 16, 1.831e12 * 8 / 120
    assert outcome.checks[0].recomputed == pytest.approx((mean, eight_layers), rel=1e-12)
    assert outcome.checks[0].relative_error == pytest.approx(130e9 / eight_layers - 1, rel=1e-9)
    assert outcome.verdict == "inconsistent"


def test_tensions_are_assumptions_outside_what_is_stated():
    assert [c.id for c in ledger.load() if verdict(c.id) == "tension"] == ["A8", "P4", "C5", "I11"]
    h100 = judge(ledger.claim("C5")).implied[0]
    assert h100.value[0] == pytest.approx(2.15e25 / (8192 * 55 * 86400 * 989.4e12), rel=1e-12)
    assert judge(ledger.claim("I11")).implied[0].value == (7.5, 7.5)
    assert judge(ledger.claim("A8")).implied[0].value[0] == pytest.approx(1.97, abs=0.005)


@pytest.mark.parametrize(
    "id, name, value, unit, becomes",
    [
        ("T3", "parameters", "1.8e12", "parameters", "consistent"),
        ("K4", "active parameters", "280e9", "parameters", "consistent"),
        ("A5b", "FLOP per token", "560e9", "FLOP", "consistent"),
        ("C4", "cost", "60e6", "USD", "consistent"),
        ("C5", "time", "90", "day", "consistent"),
        ("IC2", "cost per token", "0.0049", "USD/ktoken", "consistent"),
        ("I12", "parameters per node", "115e9", "parameters", "consistent"),
        ("I13", "weights per GPU", "< 33", "GB", "consistent"),
        ("I11", "pp", 15, "stages", "inconsistent"),  # 8 layers a stage, but 120 GPUs
        ("K1", "parameters", "1.9e12", "parameters", "inconsistent"),
        ("K9", "GPUs", 120, "GPUs", "inconsistent"),
        ("P2", "pp", 16, "stages", "tension"),
        ("D6", "tokens per expert", "8.5e6", "tokens", "inconsistent"),
        ("C3", "MFU", [0.40, 0.44], "fraction", "inconsistent"),
        ("K10", "cost ratio", "1", "ratio", "inconsistent"),
    ],
)
def test_the_verdict_follows_the_figure(id, name, value, unit, becomes):
    assert judge(restated(id, name, value, unit)).verdict == becomes != verdict(id)


def test_a_changed_premise_changes_another_verdict():
    h100 = restated("I12", "parameters per node", "115e9", "parameters")
    known = figures().replaced(h100)
    assert judge(ledger.claim("I13"), known).verdict == "consistent" != verdict("I13")


def test_a_printed_figure_stands_for_what_rounds_to_it():
    assert rounding("1.8e12") == (1.75e12, 1.85e12)
    assert rounding("25000") == (24500, 25500)
    assert rounding("30") == (29.5, 30.5)
    assert rounding("3") == (2.5, 3.5)
    assert rounding("2.15e25") == (2.145e25, 2.155e25)
    assert rounding("0.0049") == (0.00485, 0.00495)


def test_relative_error_and_power_of_ten():
    assert relative_error((63, 63), (54, 60)) == pytest.approx(0.05, rel=1e-12)
    assert relative_error((57, 57), (54, 60)) == 0
    assert relative_error((-math.inf, 30), (31, 31)) == pytest.approx(30 / 31 - 1, rel=1e-12)
    assert power_of_ten((5.55e14, 5.65e14), (5.5e11, 5.6e11)) == 3
    assert power_of_ten((1, 1), (1, 1)) == 0
    assert power_of_ten((4, 4), (64, 64)) == 0


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "a.b", "[1]", "a if b else c", "open(1)", "1 +", "'x'"]
)
def test_expressions_are_arithmetic_only(expression):
    with pytest.raises(ValueError, match="accepted|cannot read"):
        evaluate(expression, lambda name: (1.0, 1.0))


def test_unknown_claim_names_the_nearest():
    with pytest.raises(ValueError, match=r"^no claim 'A5'; nearest: .*A5[ab]") as caught:
        ledger.claim("A5")
    assert "\n" not in str(caught.value)
    assert ledger.claim("ic2").id == "IC2"


def test_glossary_is_corrected_in_both_languages():
    entries = [c for c in ledger.load() if c.kind == "glossary"]
    assert [c.id for c in entries if verdict(c.id) == "consistent"] == ["G2", "G3"]
    for c in entries:
        assert len(c.definition_en) > 60 and c.term_en and c.term_zh, c.id
        assert sum("\u4e00" <= ch <= "\u9fff" for ch in c.definition_zh) > 20, c.id


def test_json_has_the_promised_keys():
    keys = {"id", "section", "zh", "en", "stated", "unit", "recomputed", "relative_error",
            "verdict", "diagnosis", "status", "chapter"}  # fmt: skip
    rows = [ledger.as_json(c) for c in ledger.load()]
    assert all(set(row) == keys for row in rows)
    json.dumps(rows, allow_nan=False)
    row = ledger.as_json(ledger.claim("C6"))
    assert row["stated"] == {"cost": 21.5e6, "price": 2 / 3600}
    assert row["unit"] == {"cost": "USD", "price": "USD/s"}
    assert ledger.as_json(ledger.claim("K4"))["stated"] == 28e9
    assert ledger.as_json(ledger.claim("I13"))["stated"] == [None, 30e9]
    assert ledger.as_json(ledger.claim("C3"))["stated"] == [0.32, 0.36]


def test_text_shows_every_claim():
    text = ledger.table(ledger.load())
    assert all(f"\n{c.id} " in text for c in ledger.load())
    assert text.endswith("13 corrected") and "123 claims" in text
    assert "2 * N_active" in ledger.detail(ledger.claim("A5b"))


def test_constraints_find_the_smallest_conflict():
    by_name = {o.constraint.name: o for o in ledger.constraints()}
    run = by_name["the whole A100 run"]
    assert not run.satisfiable
    assert set(run.conflict) == {"n_gpus", "days", "price_a100", "cost_train"}
    assert set(by_name["parameters per node, bytes per GPU"].conflict) == {
        "weights_infer", "node_params"
    }  # fmt: skip
    assert by_name["attention and experts, one width, multi-head"].satisfiable
    assert not by_name["attention and experts, one width, multi-query"].satisfiable
    assert {o.satisfiable for o in by_name.values()} == {True, False}
    assert all(bool(o.conflict) != o.satisfiable for o in by_name.values())


def test_a_longer_run_resolves_the_conflict():
    longer = restated("C2", "time", [100, 106], "day")
    known = figures().replaced(longer)
    by_name = {o.constraint.name: o for o in ledger.constraints(known)}
    assert by_name["GPUs, days, price per hour, cost"].satisfiable


def test_the_page_is_what_the_ledger_says():
    committed = (ROOT / "claims.md").read_text(encoding="utf-8")
    tool = runpy.run_path(str(ROOT / "tools" / "claims_page.py"))
    assert tool["page"](ROOT) == committed, "run `make pages`"
    for c in ledger.load():
        assert committed.count(f"{{#claim-{c.id.lower()}}}") == 1, c.id


def test_the_tally_is_complete():
    assert sum(ledger.tally().values()) == 123
    assert tuple(ledger.tally()) == ledger.VERDICTS


def test_loads_light_and_fast():
    code = (
        "import sys, time; t = time.process_time()\n"
        "from gpt4lib import ledger; ledger.tally()\n"
        "print(time.process_time() - t, 'numpy' in sys.modules, 'torch' in sys.modules)"
    )
    runs = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert out[1:] == ["False", "False"]
        runs.append(float(out[0]))
    started = time.process_time()
    for c in ledger.load():
        judge(c)
    # The best of three of processor time: what the code needs, not what else the machine does.
    # 50 ms is meant; a slow shared core is granted three times that.
    assert min(runs) < 0.15
    assert time.process_time() - started < 0.05
