"""The calculators of the pages: the very formula strings a browser evaluates, against the library.

The formulas are plain arithmetic, valid in JavaScript and in Python alike; `_static/calculator.js`
only evaluates them and formats the result.
"""

import html.parser
import json
import pathlib
import random
import re

import pytest

from gpt4lib.analysis import collectives, cost, flops, memory, pipeline, roofline, scaling_laws, training
from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan

ROOT = pathlib.Path(__file__).parents[2]
PLAIN = re.compile(r"[A-Za-z0-9_+\-*/(). ]+")


class Form(html.parser.HTMLParser):
    """Collects inputs, presets and formulas of one calculator form."""

    def __init__(self, text):
        super().__init__()
        self.inputs, self.presets, self.formulas, self.fallbacks = {}, {}, {}, {}
        self._label, self._option, self._output = "", None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "input":
            self.inputs[attrs["name"]] = int(attrs["value"])
        elif tag == "option":
            self._option = attrs["value"]
        elif tag == "p":
            self._label = ""
        elif tag == "output":
            self._output = self._label.strip()
            self.formulas[self._output] = attrs["data-formula"]

    def handle_data(self, data):
        if self._option:
            self.presets[data.strip()] = json.loads(self._option)
            self._option = None
        elif self._output:
            self.fallbacks[self._output] = data.strip()
            self._output = None
        else:
            self._label += data


def forms(notebook):
    for cell in json.loads(notebook.read_text("utf8"))["cells"]:
        for text in re.findall(r'<form class="calculator">.*?</form>', "".join(cell["source"]), re.S):
            assert "\n\n" not in text, f"{notebook.name}: a blank line ends an HTML block"
            yield Form(text)


def computed(form, values, expected):
    """(what the page's formula gives, what the library says) for every output that is expected."""
    for label, value in expected.items():
        assert PLAIN.fullmatch(form.formulas[label])
        yield eval(form.formulas[label], {}, values), value


def spec(L, d, h, k, g, f, E, e):
    dense = E == 1
    return ModelSpec(name="form", n_layers=L, d_model=d, n_heads=h, n_kv_heads=g, head_dim=k, d_ff=f,
                     n_experts=0 if dense else E, top_k=0 if dense else e, vocab_size=1, context=1)


def expected(values):
    count = parameters(spec(**values))
    attention = count.by_part["attention"]
    experts = count.by_part["experts"] or count.by_part["ffn"]
    idle = count.total - count.active
    total = attention + experts
    return {"attention": attention, "one expert": experts // values["E"], "total": total,
            "active": total - idle, "bf16 weights": 2 * total, "active share": (total - idle) / total}


def test_chapter_1_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "01_architecture.ipynb")
    dice = random.Random(1)
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        g = dice.randint(1, 8)
        E = dice.randint(2, 64)
        cases.append(dict(L=dice.randint(1, 100), d=dice.randint(1, 9999), g=g, h=g * dice.randint(1, 9),
                          k=dice.randint(1, 256), f=dice.randint(1, 9999), E=E, e=dice.randint(1, E)))
    for values in cases:
        assert all(ours == theirs for ours, theirs in computed(form, values, expected(values))), values


def test_chapter_1_presets_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "01_architecture.ipynb")
    assert form.inputs == form.presets["gpt-4"]
    for name, v in form.presets.items():
        m = ModelSpec.preset(name)
        assert (v["L"], v["d"], v["h"], v["k"], v["g"], v["f"]) == (
            m.n_layers, m.d_model, m.n_heads, m.head_dim, m.n_kv_heads, m.d_ff)
        assert (v["E"], v["e"]) == (m.n_experts or 1, m.top_k or 1)


def test_chapter_2_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "02_dataset.ipynb")
    dice, law = random.Random(1), scaling_laws.REFIT
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        E = dice.randint(1, 256)
        cases.append(dict(N=dice.randint(1, 2000), D=dice.randint(1, 20000), B=dice.randint(1, 100), E=E, k=dice.randint(1, E)))
    for v in cases:
        n, d, batch = v["N"] * 1e9, v["D"] * 1e9, v["B"] * 1e6
        reached = scaling_laws.loss(n, d, law)
        library = {"tokens a parameter": d / n, "training FLOP, in 1e24": 6 * n * d / 1e24, "predicted loss": reached,
                   "steps": d / batch, "tokens an expert and step": batch * v["k"] / v["E"],
                   "batch over critical": batch / scaling_laws.critical_batch(reached)}
        assert all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in computed(form, v, library)), v
        (served, _), = computed(form, v, {"right for serving": 0})
        if served > 0:                                                            # the optimum for so much serving is this shape
            assert scaling_laws.optimal_served(reached, served, law) == pytest.approx((n, d), rel=1e-6)
    assert [form.presets[m]["N"] for m in ("gpt-4, active", "chinchilla-70b")] == [
        round(getattr(parameters(ModelSpec.preset(m)), kind) / 1e9) for m, kind in (("gpt-4", "active"), ("chinchilla-70b", "total"))]


def test_chapter_3_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "03_parallelism.ipynb")
    dice = random.Random(1)
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        p = dice.randint(1, 32)
        cases.append(dict(N=dice.randint(1, 10**7), t=2 ** dice.randint(0, 4), p=p, r=dice.randint(1, 300), g=dice.choice((2, 4)),
                          m=dice.randint(p, 200), v=dice.randint(1, 8), T=dice.randint(1, 10**5), d=dice.randint(1, 10**5)))
    for v in cases:
        here = v["N"] * 1e6 / (v["t"] * v["p"])
        kinds = dict(zip((2, 4), ("bf16", "fp32")))
        small = {"ffn": 300 * v["r"], "experts": 0}                                       # divides by the replicas: no rounding
        state = {z: memory.state(small, ParallelPlan(dp=v["r"], zero_stage=z), "bf16", kinds[v["g"]]) for z in (0, 1)}
        step = collectives.reduce_scatter(v["g"], v["r"]) + collectives.all_gather(2, v["r"])
        library = {"cards": v["t"] * v["p"] * v["r"], "state without ZeRO": here * sum(state[0].values()) / small["ffn"],
                   "state, ZeRO-1": here * sum(state[1].values()) / small["ffn"],
                   "bubble, if m is at least p": pipeline.bubble_fraction(v["p"], v["m"], v["v"]),
                   "all-reduces of a layer, forward": collectives.tensor_parallel_layer(v["T"], v["d"], v["t"]),
                   "gradients and weights a step": here * step}
        assert all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in computed(form, v, library)), v
    for name, v in form.presets.items():
        m = ModelSpec.preset(name)
        assert (v["N"], v["d"]) == (round(parameters(m).total / 1e6), m.d_model)
        ParallelPlan(tp=v["t"], pp=v["p"], dp=v["r"]).check(m)


def test_chapter_4_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "04_training_cost.ipynb")
    dice = random.Random(1)
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        cases.append(dict(N=dice.randint(1, 2000), D=dice.randint(1, 20_000), n=dice.randint(1, 99_999), p=dice.randint(1, 5000),
                          u=dice.randint(1, 100), g=dice.randint(1, 100), c=dice.randint(1, 1000)))
    for v in cases:
        work = flops.training(v["N"] * 1e9, v["D"] * 1e9)
        seconds = training.seconds(work, v["n"], v["p"] * 1e12, v["u"] / 100) * 100 / v["g"]
        library = {"work, 10²⁴ FLOP": work / 1e24, "days": seconds / training.SECONDS_PER_DAY,
                   "GPU-hours": cost.device_hours(v["n"], seconds), "dollars": cost.dollars(v["n"], seconds, v["c"] / 100)}
        assert all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in computed(form, v, library)), v
    for name, v in form.presets.items():
        model, _, device = name.partition(" on ")
        active = parameters(ModelSpec.preset(model)).active / 1e9
        peak = DeviceSpec.preset({"A100s": "a100-80gb", "H100s": "h100-sxm"}[device]).peak["bf16"]
        assert v["N"] == pytest.approx(active, rel=0.01) and v["p"] == int(peak / 1e12)


def test_chapter_5_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "05_mixture_of_experts.ipynb")
    dice = random.Random(1)
    for _ in range(50):
        E = dice.randint(1, 256)
        v = dict(E=E, k=dice.randint(1, E), B=dice.randint(1, 999), r=dice.randint(1, 600))
        read = roofline.distinct_experts(v["E"], v["k"], v["B"])
        library = {"experts read": read, "share read": read / E, "tokens per expert": v["B"] * v["k"] / E,
                   "compute-bound from": v["r"] * E / v["k"]}
        assert all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in computed(form, v, library)), v
    for name, v in form.presets.items():
        model, _, device = name.partition(" on an ")
        m = ModelSpec.preset(model)
        device = DeviceSpec.preset({"A100": "a100-80gb", "H100": "h100-sxm"}[device])
        assert (v["E"], v["k"], v["r"]) == (m.n_experts, m.top_k, round(roofline.ridge(device, "bf16")))


def test_chapter_6_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "06_inference.ipynb")
    names = {"gpt-4 on A100s": ("a100-40gb", "bf16"), "gpt-4 on H100s in FP8": ("h100-sxm", "fp8"), "llama-3.1-70b on A100s": ("a100-80gb", "bf16")}
    assert form.inputs == form.presets["gpt-4 on A100s"]
    for name, (card, dtype) in names.items():
        v, device = form.presets[name], DeviceSpec.preset(card)
        count, peak = parameters(ModelSpec.preset(name.partition(" on ")[0])), device.peak_flop_rate(dtype)
        read = v["t"] * device.memory_bandwidth / (v["b"] / 8)
        ridge = roofline.ridge(device, dtype)
        library = {"tokens a second, alone": read / count.active, "tokens a second, in a crowd": read / count.total,
                   "prompt tokens a second": v["t"] * peak / (2 * count.active), "FLOP per byte wanted": ridge,
                   "tokens that fill a pass": ridge * v["b"] / 16 * count.total / count.active}
        assert all(ours == pytest.approx(theirs, rel=0.01) for ours, theirs in computed(form, v, library)), name


def test_chapter_7_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "07_inference_cost.ipynb")
    dice = random.Random(1)
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        cases.append(dict(N=dice.randint(1, 2000), P=dice.randint(1, 5000), u=dice.randint(1, 100), s=dice.randint(0, 100),
                          c=dice.randint(1, 999), M=dice.randint(1, 999)))
    for v in cases:
        rate, swing = v["P"] * 1e12 * v["u"] / 100 / (2e9 * v["N"]), 1 + v["s"] / 100
        million = 1000 * cost.dollars_per_1k_tokens(1, v["c"] / 100, rate)
        library = {"tokens a second, one card": rate, "dollars for a million tokens": million,
                   "with cards for the peak": million * swing, "tokens that cost as much as training": v["M"] * 1e12 / (million * swing)}
        assert all(ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in computed(form, v, library)), v
    for name, card, dtype in (("gpt-4 on A100s", "a100-40gb", "bf16"), ("gpt-4 on H100s in FP8", "h100-sxm", "fp8"),
                              ("deepseek-v3 on H800s in FP8", "h800", "fp8")):
        v, count = form.presets[name], parameters(ModelSpec.preset(name.partition(" on ")[0]))
        assert (v["N"], v["P"]) == (round(count.active / 1e9), round(DeviceSpec.preset(card).peak_flop_rate(dtype) / 1e12))


def test_chapter_8_formulas_are_the_library_s():
    (form,) = forms(ROOT / "chapters" / "08_multi_query_attention.ipynb")
    dice = random.Random(1)
    cases = [form.inputs, *form.presets.values()]
    for _ in range(50):
        g = dice.randint(1, 8)
        cases.append(dict(L=dice.randint(1, 100), g=g, h=g * dice.randint(1, 9), k=2 * dice.randint(1, 128),
                          S=dice.randint(1, 99999), B=dice.randint(1, 999)))
    for v in cases:
        m = ModelSpec("form", n_layers=v["L"], d_model=64, n_heads=v["h"], n_kv_heads=v["g"], head_dim=v["k"], d_ff=1,
                      vocab_size=1, context=10**6)
        scores = flops.decode(m, v["B"], v["S"] - 1).by_part["scores"]          # the new token is one of the S keys
        library = {"one token": memory.kv_cache_bytes(m, 1, 1), "one sequence": memory.kv_cache_bytes(m, 1, v["S"]),
                   "the batch": memory.kv_cache_bytes(m, v["B"], v["S"]), "less than multi-head": 1 - v["g"] / v["h"],
                   "attention FLOP a step": scores}
        assert all(ours == theirs for ours, theirs in computed(form, v, library)), v
    for name, v in form.presets.items():
        m = ModelSpec.preset(name)
        assert (v["L"], v["h"], v["g"], v["k"]) == (m.n_layers, m.n_heads, m.n_kv_heads, m.head_dim)


def test_without_javascript_the_page_shows_the_first_preset():
    (form,) = forms(ROOT / "chapters" / "01_architecture.ipynb")
    units = {"T": 1e12, "B": 1e9, "TB": 1e12, "%": 0.01}
    for label, text in form.fallbacks.items():
        number, unit = text.split()
        value = expected(form.inputs)[label]
        assert float(number) * units[unit] == pytest.approx(value, rel=5e-3)     # printed digits


@pytest.mark.parametrize("chapter", ["02_dataset", "03_parallelism", "04_training_cost", "05_mixture_of_experts", "08_multi_query_attention"])
def test_without_javascript_the_page_shows_what_its_formulas_give(chapter):
    (form,) = forms(ROOT / "chapters" / f"{chapter}.ipynb")
    units = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "kB": 1e3, "MB": 1e6, "GB": 1e9, "T": 1e12, "%": 0.01}
    assert form.fallbacks.keys() == form.formulas.keys() and form.inputs == next(iter(form.presets.values()))
    for label, text in form.fallbacks.items():
        number, _, unit = text.partition(" ")
        digit = units[unit] * 10.0 ** -len(number.partition(".")[2])              # what the last printed digit stands for
        assert float(number) * units[unit] == pytest.approx(eval(form.formulas[label], {}, form.inputs), abs=0.51 * digit)
