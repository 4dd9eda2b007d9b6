"""from_hf against `transformers` itself, on the meta device: every family, several shapes, exact equality."""

import json
import random

import pytest

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs.huggingface import FAMILIES, from_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")      # transformers warns about special tokens of toy vocabularies


def sizes(dice):
    """Random sizes that every family accepts: heads divide, widths are even."""
    kv, groups, layers = dice.choice([1, 2, 4]), dice.choice([1, 2, 3]), dice.randint(2, 5)
    return dict(hidden_size=kv * groups * 2 * dice.randint(2, 9), num_hidden_layers=layers,
                num_attention_heads=kv * groups, num_key_value_heads=kv, intermediate_size=dice.randint(8, 90),
                vocab_size=dice.randint(20, 150), max_position_embeddings=dice.randint(8, 99),
                tie_word_embeddings=dice.random() < 0.5, attention_bias=dice.random() < 0.5)


def gpt2(dice):
    heads = dice.randint(1, 4)
    return dict(n_layer=dice.randint(1, 4), n_head=heads, n_embd=heads * 2 * dice.randint(1, 9),
                n_positions=dice.randint(8, 64), vocab_size=dice.randint(20, 99),
                n_inner=dice.choice([None, dice.randint(8, 50)]), multi_query=dice.random() < 0.5)


def moe(dice):
    return dict(num_experts=dice.randint(2, 6), num_experts_per_tok=2, moe_intermediate_size=dice.randint(4, 30),
                shared_expert_intermediate_size=dice.randint(4, 30), decoder_sparse_step=dice.randint(1, 2),
                mlp_only_layers=dice.choice([[], [0]]))


def latent(dice):
    return dict(kv_lora_rank=dice.randint(4, 20), q_lora_rank=dice.choice([None, dice.randint(4, 20)]),
                qk_rope_head_dim=2 * dice.randint(1, 4), qk_nope_head_dim=2 * dice.randint(1, 6),
                v_head_dim=2 * dice.randint(1, 6), n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
                moe_intermediate_size=dice.randint(4, 30), n_shared_experts=dice.randint(1, 2),
                first_k_dense_replace=dice.randint(0, 2))


def head(dice):
    return dict(head_dim=2 * dice.randint(2, 9))


def window(dice):
    return dict(sliding_window=dice.randint(4, 64))


def local(dice):
    return dict(num_local_experts=dice.randint(2, 6), num_experts_per_tok=2)


def indexer(dice):
    return dict(q_lora_rank=12, index_n_heads=dice.randint(1, 3), index_head_dim=16, index_topk=4)


def hybrid(dice):
    return dict(linear_num_key_heads=2, linear_num_value_heads=2 * dice.randint(1, 3), linear_key_head_dim=8,
                linear_value_head_dim=dice.choice([4, 8]), linear_conv_kernel_dim=dice.randint(2, 4))


def opt(dice):
    return dict(ffn_dim=dice.randint(8, 90), word_embed_proj_dim=dice.choice([6, 12]),
                do_layer_norm_before=dice.random() < 0.5, enable_bias=dice.random() < 0.5, tie_word_embeddings=True)


def bloom(dice):
    return dict(n_layer=dice.randint(1, 4), n_head=2, hidden_size=4 * dice.randint(1, 9), vocab_size=77)


def falcon(dice):
    return dict(num_kv_heads=1, new_decoder_architecture=dice.random() < 0.5, multi_query=dice.random() < 0.5,
                parallel_attn=dice.random() < 0.5, bias=dice.random() < 0.5, alibi=dice.random() < 0.5)


def dbrx(dice):
    d = 8 * dice.randint(1, 8)
    return dict(d_model=d, n_heads=4, n_layers=dice.randint(1, 4), max_seq_len=32, vocab_size=88,
                attn_config=dict(kv_n_heads=dice.choice([1, 2, 4]), rope_theta=10_000.0),
                ffn_config=dict(ffn_hidden_size=dice.randint(8, 50), hidden_size=d, moe_num_experts=4, moe_top_k=2))


def glm4(dice):
    return dict(use_qk_norm=dice.random() < 0.5, q_lora_rank=8)


def llama4(dice):
    return dict(intermediate_size_mlp=dice.randint(8, 90), interleave_moe_layer_step=dice.randint(1, 2),
                attention_chunk_size=16, attention_bias=False)


SHAPES = {
    "gpt2": [gpt2], "gpt_bigcode": [gpt2], "gpt_neox": [sizes], "opt": [sizes, opt], "bloom": [bloom],
    "falcon": [sizes, falcon], "llama": [sizes, head], "mistral": [sizes, head], "mixtral": [sizes, head, local],
    "qwen2": [sizes], "qwen2_moe": [sizes, moe], "qwen3": [sizes, head], "qwen3_moe": [sizes, head, moe],
    "qwen3_vl_text": [sizes, head], "qwen3_vl_moe_text": [sizes, head, moe],
    "qwen3_5_text": [sizes, head, hybrid], "qwen3_5_moe_text": [sizes, head, hybrid, moe],
    "deepseek_v2": [sizes, latent], "deepseek_v3": [sizes, latent], "deepseek_v32": [sizes, latent, indexer],
    "glm_moe_dsa": [sizes, latent, indexer], "kimi_k2": [sizes, latent], "dbrx": [dbrx],
    "gpt_oss": [sizes, head, local, window], "glm4_moe": [sizes, head, latent, glm4], "minimax_m2": [sizes, head, local],
    "llama4_text": [sizes, head, local, llama4], "olmo2": [sizes], "gemma2": [sizes, head, window],
}
LOADED_AS = {"kimi_k2": "deepseek_v3"}      # the released code is DeepSeek-V3's under another name


def theirs(model_type, config):
    """Parameters of transformers' own model; where only the decoder is exposed, its head is added."""
    made = transformers.AutoConfig.for_model(LOADED_AS.get(model_type, model_type), **config)
    with torch.device("meta"):
        try:
            return made, sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(made).parameters())
        except ValueError:
            body = transformers.AutoModel.from_config(made)
    untied = not config.get("tie_word_embeddings", False)
    return made, sum(p.numel() for p in body.parameters()) + untied * made.vocab_size * made.hidden_size


def test_every_family_has_shapes_to_try():
    assert set(SHAPES) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_total_equals_transformers(model_type, seed):
    dice = random.Random(f"{model_type}{seed}")
    config = {k: v for draw in SHAPES[model_type] for k, v in draw(dice).items()}
    made, total = theirs(model_type, config)
    for source in (made.to_dict(), {**config, "model_type": model_type}):   # as saved, and as written by hand
        spec = from_hf({**source, "model_type": model_type, "tie_word_embeddings":
                        config.get("tie_word_embeddings", made.tie_word_embeddings)})
        assert parameters(spec).total == total, config
    assert parameters(spec.with_(vocab_size=spec.vocab_size + 1)).total != total


LLAMA = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=96, vocab_size=100, max_position_embeddings=64)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="lama"), "model_type 'lama' is not read; did you mean 'llama'? accepted: gpt2"),
    (dict(model_type=None), "model_type None is not read"),
    (dict(model_type="deepseek_v4"), "model_type 'deepseek_v4' is not read"),
    (dict(hidden_size=None), "field 'hidden_size' is missing"),
    (dict(num_hidden_layers=0), "n_layers=0 is not accepted"),
    (dict(vocab_size=-1), "vocab_size=-1 is not accepted"),
    (dict(intermediate_size=float("nan")), "d_ff=nan is not accepted"),
    (dict(num_attention_heads="many"), "n_heads='many' is not accepted"),
    (dict(num_key_value_heads=3), "n_heads=4 is not divisible by n_kv_heads=3"),
    (dict(tie_word_embeddings="no"), "tied='no' is not accepted"),
])
def test_a_bad_config_names_the_field(change, words):
    with pytest.raises(ValueError) as error:
        from_hf({**LLAMA, **change})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_path_a_directory_and_a_dict_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    a, b, c = from_hf(str(tmp_path / "config.json")), from_hf(tmp_path), from_hf(LLAMA)
    assert a.with_(name="x") == b.with_(name="x") == c.with_(name="x") and a.name == tmp_path.name


def test_a_multimodal_config_gives_its_text_decoder():
    assert from_hf({"model_type": "anything_vl", "text_config": LLAMA}) == from_hf(LLAMA)


@pytest.mark.parametrize("content, words", [
    ("{", "is not JSON"), ("[1, 2]", "is a list, not an object"), ("\x00\x01", "is not JSON"),
    (" " * 2_000_000, "is 2 MB; a config.json is well under 1 MB"), ("[" * 100_000, "is not JSON")])
def test_a_file_that_is_no_config_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        from_hf(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json cannot be read"):
        from_hf(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        from_hf(tmp_path)


@pytest.mark.parametrize("family, config_class", [("mistral", "MistralConfig"), ("mixtral", "MixtralConfig")])
def test_keys_that_mistral_leaves_out_mean_what_they_mean_to_transformers(family, config_class):
    import transformers
    config = getattr(transformers, config_class)().to_dict()
    short = {k: v for k, v in config.items() if k not in ("sliding_window", "num_key_value_heads")}
    spec, full = from_hf(short), from_hf(config)
    assert (spec.window, spec.n_kv_heads) == (full.window, full.n_kv_heads) == (config["sliding_window"], 8)
    assert from_hf({**config, "sliding_window": None}).window is None
