"""ModelSpec: what it accepts, what it refuses, and in which words."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import LatentAttention, ModelSpec, registry

SMALL = dict(name="small", n_layers=2, d_model=64, n_heads=8, d_ff=128, vocab_size=100, context=32)


def test_leaving_out_heads_means_multi_head():
    spec = ModelSpec(**SMALL)
    assert (spec.n_kv_heads, spec.head_dim, spec.q_width) == (8, 8, 64)


@pytest.mark.parametrize("change, words", [
    (dict(n_layers=0), "n_layers=0 is not accepted; give an integer >= 1"),
    (dict(n_layers=-3), "n_layers=-3"),
    (dict(d_model=math.nan), "d_model=nan is not accepted"),
    (dict(vocab_size="50257"), "vocab_size='50257' is not accepted"),
    (dict(n_heads=True), "n_heads=True is not accepted"),
    (dict(n_heads=96, head_dim=8, n_kv_heads=7), "n_heads=96 is not divisible by n_kv_heads=7; accepted"),
    (dict(n_heads=7), "d_model=64 is not divisible by n_heads=7; change one of them or set head_dim"),
    (dict(positions="spiral"), "positions='spiral' is not known; accepted: rotary"),
    (dict(tied=1), "tied=1 is not accepted; give true or false"),
    (dict(top_k=2), "need n_experts >= 1"),
    (dict(n_experts=4, top_k=5), "top_k=5 is not accepted; give 1 to n_experts=4"),
    (dict(n_experts=4, top_k=1, moe_layers=(0, 2)), "layer numbers between 0 and n_layers-1=1"),
    (dict(layer_kinds=("full",)), "layer_kinds has 1 entries; give one for each of the 2 layers"),
    (dict(layer_kinds=("full", "window")), "window is not set"),
    (dict(layer_kinds=("full", "round")), "layer_kinds holds ['round']"),
    (dict(d_ff=0), "d_ff=0 is not accepted"),
])
def test_nonsense_is_refused_in_one_line(change, words):
    with pytest.raises(ValueError) as error:
        ModelSpec(**{**SMALL, **change})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_spec_cannot_be_changed():
    with pytest.raises(AttributeError):
        ModelSpec(**SMALL).n_layers = 3


def test_a_copy_is_validated_again():
    with pytest.raises(ValueError, match="n_kv_heads=5"):
        ModelSpec(**SMALL).with_(n_kv_heads=5)
    assert ModelSpec(**SMALL).with_(n_layers=5).layer_kinds == ("full",) * 5


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="unknown field.* n_layer;"):
        ModelSpec.from_dict({**SMALL, "n_layer": 3})
    with pytest.raises(ValueError, match="missing field.* context"):
        ModelSpec.from_dict({k: v for k, v in SMALL.items() if k != "context"})


def test_an_unknown_model_names_the_presets():
    with pytest.raises(ValueError, match="neither a preset nor a file; presets: gpt-4, "):
        ModelSpec.load("gpt-5")


@pytest.mark.parametrize("kind", ["models", "devices", "clusters"])
def test_every_preset_number_has_a_source_and_a_status(kind):
    for name in registry.names(kind):
        for field, source in registry.provenance(kind, name).items():
            assert source.status in registry.STATUSES, (name, field)
            assert len(source.source) > 15, (name, field)
        stray = set(registry._table(kind, name)["source"]) - {"status", "text"} - set(registry.load(kind, name))
        assert not stray, f"{name} gives a source for {stray}, which it does not state"


@st.composite
def specs(draw):
    """Random valid models: dense or not, any attention, any norm."""
    n = st.integers
    kv, groups, layers = draw(n(1, 4)), draw(n(1, 4)), draw(n(1, 6))
    experts = draw(n(0, 6))
    flags = {f: draw(st.booleans()) for f in ("qkv_bias", "out_bias", "gated_ffn", "ffn_bias", "tied", "head_bias")}
    moe = dict(n_experts=experts, top_k=draw(n(1, experts)), d_expert=draw(n(1, 40)),
               d_shared=draw(st.sampled_from([0, 8])), router_bias=draw(st.booleans())) if experts else {}
    latent = draw(st.none() | st.builds(LatentAttention, kv_rank=n(1, 9), rope_dim=n(0, 4), nope_dim=n(1, 9),
                                        v_dim=n(1, 9), q_rank=st.none() | n(1, 9)))
    return ModelSpec(name="random", n_layers=layers, d_model=draw(n(1, 64)), n_heads=kv * groups, n_kv_heads=kv,
                     head_dim=draw(n(1, 16)), d_ff=draw(n(1, 99)), vocab_size=draw(n(1, 99)), context=draw(n(1, 99)),
                     norm=draw(st.sampled_from(["layernorm", "rmsnorm"])), latent=latent,
                     positions=draw(st.sampled_from(["learned", "rotary"])), **flags, **moe)


@given(specs())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_counts_of_random_models_behave(spec):
    count = parameters(spec)
    assert count.total == sum(count.by_part.values()) and 0 < count.active <= count.total
    if spec.is_moe:
        assert parameters(spec.with_(top_k=spec.n_experts)).active == count.total
    one, two, three = (parameters(spec.with_(n_layers=n)).total for n in (1, 2, 3))
    assert three - two == two - one                       # every layer costs the same
