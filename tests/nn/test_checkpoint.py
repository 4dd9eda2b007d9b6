"""Checkpoints of transformers' own models give the same logits through ours, and back."""

import json
import pathlib
import pickle
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpt4lib.nn import checkpoint
from gpt4lib.nn.cache import KVCache
from gpt4lib.nn.numerics import Llama3Rope, Numerics
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import ModelSpec

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
OLD = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
LLAMA3 = dict(rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**OLD, multi_query=True),
    "llama": transformers.LlamaConfig(**SIZES),
    "llama 3.1": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama with biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=12),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=8),
    "gpt2": transformers.GPT2Config(**OLD),
    "gpt2, exact gelu": transformers.GPT2Config(**OLD, activation_function="gelu", n_inner=40),
}
TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))


def theirs(config, folder, **how):
    """One of transformers' models, drawn large enough that every part matters, saved in folder."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder, **how)
    return model


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    return theirs(MODELS[request.param], tmp_path), tmp_path


def same(ours, expected):
    """fp32 through two layers: 1e-5 of the largest logit, and the same token everywhere."""
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max() and torch.equal(ours.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    model, folder = pair
    ours, expected = checkpoint.load(folder), model(TOKENS).logits
    same(ours(TOKENS), expected)
    cache, parts = KVCache(), []
    for part in TOKENS.split([11, *[1] * 10, 3], 1):                    # prefill, ten single steps, a chunk
        parts.append(ours(part, cache))
    same(torch.cat(parts, 1), expected)


def by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def test_what_we_save_is_what_transformers_loads(pair, tmp_path):
    model, folder = pair
    out = tmp_path / "again"
    checkpoint.save(checkpoint.load(folder), out)
    same(by_transformers(out)(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_shards_and_their_index(tmp_path):
    model = theirs(MODELS["mixtral"], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = checkpoint.load(tmp_path)
    same(ours(TOKENS), model(TOKENS).logits)
    checkpoint.save(ours, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 and not list((tmp_path / "out").glob("*.tmp"))
    same(checkpoint.load(tmp_path / "out")(TOKENS), model(TOKENS).logits)
    checkpoint.save(ours, tmp_path / "out")                             # one file now: the old index must not win
    same(checkpoint.load(tmp_path / "out")(TOKENS), model(TOKENS).logits)


@pytest.mark.parametrize("stored, asked", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                           (torch.float16, torch.float64), (torch.float64, torch.float32)])
def test_dtypes_are_converted(tmp_path, stored, asked):
    theirs(MODELS["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n: t.to(stored) for n, t in load_file(file).items()}
    save_file(tensors, file)
    model = checkpoint.load(tmp_path, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {asked}
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"].to(asked))


def test_our_own_models_round_trip(tmp_path):
    spec = ModelSpec("ours", n_layers=2, d_model=16, n_heads=4, n_kv_heads=1, d_ff=24, vocab_size=30, context=32, gated_ffn=True,
                     norm="rmsnorm", n_experts=4, top_k=2, tied=True)
    model = Transformer(spec, seed=3, numerics=Numerics(norm_eps=1e-5, rope_base=1e6))
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.numerics == model.numerics and again.spec.with_(name="ours") == spec
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_model_no_family_can_express_says_which_field(tmp_path):
    spec = ModelSpec("odd", n_layers=1, d_model=16, n_heads=4, d_ff=24, vocab_size=30, context=32, sinks=True, gated_ffn=True, norm="rmsnorm")
    with pytest.raises(ValueError, match="odd: a llama checkpoint cannot say sinks=True"):
        checkpoint.save(Transformer(spec), tmp_path)
    assert not list(tmp_path.iterdir())


# --- what can be wrong on disk ------------------------------------------------------------------------------
def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as f:
        pickle.dump({}, f)


def index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)


def held_twice(folder, named):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "a.safetensors")
    save_file({n: tensors[n] for n in (NAME, "lm_head.weight")}, folder / "b.safetensors")
    index(folder, json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(named, "b.safetensors")}))


NAME = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing": (lambda d: edit(d, lambda t: t.pop(NAME)), f"tensor '{NAME}' is missing"),
    "unknown": (lambda d: edit(d, lambda t: t.update(extra=torch.zeros(1))), "tensor 'extra' is not part of this model"),
    "shape": (lambda d: edit(d, lambda t: t.update({NAME: torch.zeros(3, 32)})), f"tensor '{NAME}'.*has shape \\(3, 32\\).*\\(48, 32\\)"),
    "integers": (lambda d: edit(d, lambda t: t.update({NAME: torch.zeros(48, 32, dtype=torch.int8)})), f"tensor '{NAME}'.*stored as I8"),
    "truncated": (truncate, "model.safetensors is not a whole safetensors file"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "not a whole safetensors file"),
    "pickle": (pickled, "pytorch_model.bin is a pickle, which can run code and is refused"),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is not there"),
    "absent shard": (lambda d: index(d, json.dumps({"weight_map": {NAME: "model-2.safetensors"}})), "model-2.safetensors is not there"),
    "shard elsewhere": (lambda d: index(d, json.dumps({"weight_map": {NAME: "../x/model.safetensors"}})), "is not there"),
    "index of another": (lambda d: index(d, json.dumps({"weight_map": {"foo": "model.safetensors"}})), "places tensor 'foo' in model.safetensors"),
    "held twice": (lambda d: held_twice(d, ["lm_head.weight"]), "'lm_head.weight' is held twice, by .*a.safetensors and b.safetensors"),
    "held twice, last named": (lambda d: held_twice(d, ["lm_head.weight", NAME]), "is held twice, by .*a.safetensors and b.safetensors"),
    "index no JSON": (lambda d: index(d, "{"), "is not an index"),
    "index no map": (lambda d: index(d, "[]"), "is not an index"),
    "rope": (lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type 'yarn'; accepted: default, llama3"),
    "rope no object": (lambda d: edit_config(d, rope_parameters="x"), "llama config: rope_parameters='x' is not accepted; give an object"),
    "rope theta": (lambda d: edit_config(d, rope_parameters={"rope_theta": "x"}), "rope_theta='x'"),
    "rope empty": (lambda d: edit_config(d, rope_parameters={"rope_type": "llama3"}), "llama config: factor=None is not accepted; give a finite"),
    "rope factor": (lambda d: edit_config(d, rope_parameters=LLAMA3 | {"factor": "8"}), "factor='8' is not accepted; give a finite number > 0"),
    "rope context": (lambda d: edit_config(d, rope_parameters=LLAMA3 | {"original_max_position_embeddings": None}),
                     "original_max_position_embeddings=None"),
    "rope limits": (lambda d: edit_config(d, rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}),
                    "low_freq_factor=4.0 is not accepted; give a number below high_freq_factor=4.0"),
    "eps null": (lambda d: edit_config(d, rms_norm_eps=None), "llama config: rms_norm_eps=None is not accepted; give a finite number > 0"),
    "eps text": (lambda d: edit_config(d, rms_norm_eps="x"), "rms_norm_eps='x'"),
    "eps NaN": (lambda d: edit_config(d, rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "activation": (lambda d: edit_config(d, hidden_act="relu"), "activation 'relu'; accepted: silu"),
    "family": (lambda d: edit_config(d, model_type="qwen3"), "'qwen3' can be counted but its weights are not read"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_disk_is_one_line_that_names_it(tmp_path, fault):
    theirs(MODELS["llama"], tmp_path)
    spoil, words = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make, words", [(lambda: Numerics(norm_eps="x"), "norm_eps='x'"), (lambda: Numerics(rope_base=True), "rope_base=True"),
                                         (lambda: Numerics(rope_base=float("inf")), "rope_base=inf"),
                                         (lambda: Llama3Rope("8", 1, 4, 16), "factor='8'"), (lambda: Llama3Rope(8, 0, 4, 16), "low_freq_factor=0"),
                                         (lambda: Llama3Rope(8, 4, 4, 16), "low_freq_factor=4 .*below high_freq_factor=4"),
                                         (lambda: Llama3Rope(8, 1, 4, None), "original_context=None")])
def test_numerics_refuse_what_is_no_number_in_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("family", checkpoint.FAMILIES)
def test_an_absent_key_means_what_it_means_to_transformers(family):
    full = transformers.AutoConfig.for_model(family).to_dict()
    numerics = checkpoint.numerics_of({"model_type": family})
    assert numerics == checkpoint.numerics_of(full)
    assert numerics.norm_eps == full.get("rms_norm_eps", full.get("layer_norm_epsilon"))
    assert numerics.rope_base == full.get("rope_parameters", {"rope_theta": 1e4})["rope_theta"]


@pytest.mark.parametrize("name, keys", [("mixtral", ("rms_norm_eps", "rope_parameters", "hidden_act")), ("gpt2", ("activation_function",)),
                                        ("gpt_bigcode", ("activation_function", "layer_norm_epsilon")), ("mistral", ("rms_norm_eps",))])
def test_a_short_config_gives_the_logits_of_transformers(tmp_path, name, keys):
    theirs(MODELS[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))
    with torch.no_grad():
        same(checkpoint.load(tmp_path)(TOKENS), by_transformers(tmp_path)(TOKENS).logits)


@pytest.mark.parametrize("rope", [dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
                                  dict(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default", "rope_theta": 1e4})])
def test_older_words_for_the_rotation_mean_what_they_mean_to_transformers(rope):
    full = transformers.LlamaConfig.from_dict(SIZES | rope).to_dict()
    assert checkpoint.numerics_of(SIZES | rope | {"model_type": "llama"}) == checkpoint.numerics_of(full)


def test_a_tied_head_stored_twice_must_agree(tmp_path):
    theirs(MODELS["llama 3.1"], tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint.load(tmp_path)
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="ties the head to the embedding, but 'lm_head.weight' holds other numbers"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("change, words", [(dict(multi_query=False), "multi_query=false"), (dict(scale_attn_weights=False), "scale_attn_weights"),
                                           (dict(add_cross_attention=True), "add_cross_attention")])
def test_what_gpt2_s_relatives_can_say_and_we_do_not_compute(tmp_path, change, words):
    theirs(MODELS["gpt_bigcode"], tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    theirs(MODELS["llama"], tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".tmp"}
    model = checkpoint.load(tmp_path)

    def full(*_, **__):
        raise OSError("disk full")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".tmp"} == before
    checkpoint.load(tmp_path)


def weights(seed):
    """One of two models of the same config, so that only the weights tell which was read."""
    spec = ModelSpec("ours", n_layers=2, d_model=16, n_heads=4, d_ff=24, vocab_size=30, context=32, gated_ffn=True, norm="rmsnorm",
                     tied=False)
    return Transformer(spec, seed=seed)


def which(folder):
    """The seeds of the models that ours and transformers read in folder; StopIteration for a mix of them."""
    ours, other = checkpoint.load(folder), by_transformers(folder).state_dict()
    read = [{e.name: e.parts[0] for e in checkpoint.layout(ours, "llama")}, other]
    known = [{e.name: e.parts[0] for e in checkpoint.layout(weights(seed), "llama")} for seed in (0, 1)]
    return [next(seed for seed in (0, 1) if all(torch.equal(r[n], t) for n, t in known[seed].items())) for r in read]


SHARDED, WHOLE = 4_000, 10**9


@pytest.mark.parametrize("before, after", [(WHOLE, SHARDED), (SHARDED, WHOLE), (SHARDED, SHARDED), (WHOLE, WHOLE), (SHARDED, 7_000)])
def test_a_save_replaces_the_checkpoint_for_every_reader(tmp_path, before, after):
    for seed, size in enumerate((before, after)):
        checkpoint.save(weights(seed), tmp_path, size)
    assert which(tmp_path) == [1, 1]
    checkpoint.save(weights(0), tmp_path / "fresh", after)              # and leaves no file of the old one
    assert len(list(tmp_path.glob("*.*"))) == len(list((tmp_path / "fresh").iterdir()))


def test_a_failure_on_the_second_shard_changes_nothing(tmp_path, monkeypatch):
    checkpoint.save(weights(0), tmp_path, SHARDED)
    old, calls = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, []

    def full(*how, **more):
        calls.append(how)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(*how, **more)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(weights(1), tmp_path, SHARDED)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old and which(tmp_path) == [0, 0]


@pytest.mark.parametrize("before, after", [(WHOLE, SHARDED), (SHARDED, WHOLE), (SHARDED, SHARDED), (WHOLE, WHOLE)])
def test_killed_between_any_two_steps_a_save_leaves_the_old_weights_or_the_new(tmp_path, monkeypatch, before, after):
    class Killed(BaseException):
        pass
    left = 0
    while True:
        folder, steps = tmp_path / str(left), iter([True] * left)
        checkpoint.save(weights(0), folder, before)

        def step(real):
            def counted(path, *how, **more):
                if path.suffix != ".tmp" or real is not unlink:         # what the clean-up of .tmp files does is no step
                    if not next(steps, False):
                        raise Killed
                return real(path, *how, **more)
            return counted
        replace, unlink = pathlib.Path.replace, pathlib.Path.unlink
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", step(replace))
            patch.setattr(pathlib.Path, "unlink", step(unlink))
            try:
                checkpoint.save(weights(1), folder, after)
                done = True
            except Killed:
                done = False
        assert set(which(folder)) <= {0, 1}
        if done:
            break
        left += 1
    assert left >= 2 and which(folder) == [1, 1]


def test_a_save_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    earlier = []

    def watched(tensors, *how, **more):
        assert not any(t() is not None for t in earlier)
        earlier.extend(map(weakref.ref, tensors.values()))
        save_file(tensors, *how, **more)
    monkeypatch.setattr("safetensors.torch.save_file", watched)
    checkpoint.save(weights(0), tmp_path, SHARDED)
    assert len(earlier) > 10


def test_old_gpt2_files_without_prefix_and_with_mask_buffers(tmp_path):
    model = theirs(MODELS["gpt2"], tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, file)
    with torch.no_grad():
        same(checkpoint.load(tmp_path)(TOKENS), model(TOKENS).logits)
