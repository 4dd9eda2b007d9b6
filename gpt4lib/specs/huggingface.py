"""From a Hugging Face config.json to a ModelSpec. A family is a row of a table, not a class.

Multimodal configs are read for their text decoder. Multi-token-prediction layers are not counted, as
`transformers` does not load them either. What decides a count is never guessed: a missing size is an error.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Callable, Mapping

from gpt4lib.specs.model import Indexer, LatentAttention, LinearAttention, ModelSpec

Config = Mapping[str, Any]
LARGEST_FILE = 1_000_000
REQUIRED = object()


class Key:
    """A config key; without a default it must be there. The default is the one `transformers` defines."""

    def __init__(self, name: str, default: Any = REQUIRED) -> None:
        self.name, self.default = name, default

    def __call__(self, c: Config) -> Any:
        value = c.get(self.name)
        if value is None and self.default is REQUIRED:
            raise ValueError(f"field {self.name!r} is missing; a {c['model_type']} config needs it")
        return self.default if value is None else value


def count(c: Config, name: str, default: Any = REQUIRED) -> int:
    """An integer field that takes part in arithmetic here, checked before it does."""
    value = Key(name, default)(c)
    if type(value) is not int or value < 0:
        raise ValueError(f"field {name!r}={value!r} is not accepted; give an integer >= 0")
    return value


# --- what needs more than a look-up --------------------------------------------------------------------
def _every(c: Config, step: int) -> list[bool]:
    """For each layer, whether it is the last of `step`; none is where step is 0."""
    return [step > 0 and (i + 1) % step == 0 for i in range(count(c, "num_hidden_layers"))]


def _first_dense(c: Config) -> tuple[int, ...]:
    if "mlp_layer_types" in c:
        return tuple(i for i, kind in enumerate(c["mlp_layer_types"]) if kind == "sparse")
    return tuple(range(count(c, "first_k_dense_replace"), count(c, "num_hidden_layers")))


def _sparse_step(c: Config) -> tuple[int, ...]:
    step, dense = count(c, "decoder_sparse_step", 1), Key("mlp_only_layers", ())(c)
    return tuple(i for i, sparse in enumerate(_every(c, step)) if sparse and i not in dense)


def _interleaved(c: Config) -> tuple[int, ...]:
    step = count(c, "interleave_moe_layer_step")
    return tuple(Key("moe_layers", range(step - 1, count(c, "num_hidden_layers"), step or 1))(c))


def _shared(c: Config) -> int:
    return count(c, "n_shared_experts", 0) * count(c, "moe_intermediate_size")


def _latent(c: Config) -> LatentAttention:
    indexer = None
    if "index_head_dim" in c:
        # Every freq-th layer after an offset owns an indexer; the layers between reuse its choice.
        freq, offset = max(count(c, "index_topk_freq", 1), 1), count(c, "index_skip_topk_offset", 2)
        owns = [max(i - offset + 1, 0) % freq == 0 for i in range(count(c, "num_hidden_layers"))]
        kinds = c.get("indexer_types")
        layers = sum(owns) if kinds is None else sum(kind == "full" for kind in kinds)
        indexer = Indexer(count(c, "index_n_heads"), count(c, "index_head_dim"), layers)
    sizes = (Key(k)(c) for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    return LatentAttention(*sizes, q_rank=c.get("q_lora_rank"), indexer=indexer)


def _linear(c: Config) -> LinearAttention:
    return LinearAttention(*(Key("linear_" + k)(c) for k in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")))


def _kinds(rest: str | None = None, step: Callable[[Config], int] = lambda c: 2) -> Callable[[Config], tuple[str, ...] | None]:
    """Layer kinds from `layer_types`. Without it: every `step`-th layer has full attention among those of kind `rest`, or
    none differs."""
    names = {"full_attention": "full", "sliding_attention": "window", "linear_attention": "linear",
             "chunked_attention": "window"}

    def kinds(c: Config) -> tuple[str, ...] | None:
        if listed := c.get("layer_types"):
            unknown = sorted({str(t) for t in listed} - set(names))
            if unknown:
                raise ValueError(f"field 'layer_types' holds {unknown}; accepted: {', '.join(names)}")
            return tuple(names[t] for t in listed)
        last = _every(c, step(c))
        return tuple("full" if full else rest for full in last) if rest else None
    return kinds


def _chunked(c: Config) -> tuple[str, ...]:
    """Llama 4: layers with rotary positions attend within a chunk, those without to everything."""
    last = _every(c, count(c, "no_rope_layer_interval", 4))
    return tuple("window" if rotary else "full" for rotary in c.get("no_rope_layers") or [not full for full in last])


def _falcon_kv(c: Config) -> int:
    heads = count(c, "num_attention_heads")
    if c.get("new_decoder_architecture"):
        return count(c, "num_kv_heads", heads)
    return 1 if c.get("multi_query", True) else heads


def _falcon_norms(c: Config) -> int:
    if c.get("new_decoder_architecture"):
        return count(c, "num_ln_in_parallel_attn", 2)
    return 1 if c.get("parallel_attn", True) else 2


def _nested(outer: str, name: str) -> Callable[[Config], Any]:
    return lambda c: Key(name)({"model_type": c["model_type"], **Key(outer)(c)})


# --- the table: rows build on rows ---------------------------------------------------------------------
def row(*bases: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A family: ModelSpec field -> constant, Key or function of the config; later entries win."""
    return {field: look for base in (*bases, fields) for field, look in base.items()}


def biases(on: Any) -> dict[str, Any]:
    return row(qkv_bias=on, out_bias=on, ffn_bias=on)


TIED, UNTIED = Key("tie_word_embeddings", True), Key("tie_word_embeddings", False)
SIZES = row(n_layers=Key("num_hidden_layers"), d_model=Key("hidden_size"), n_heads=Key("num_attention_heads"),
            d_ff=Key("intermediate_size"), vocab_size=Key("vocab_size"), context=Key("max_position_embeddings"))
GPT2 = row(biases(True), n_layers=Key("n_layer"), d_model=Key("n_embd"), n_heads=Key("n_head"), vocab_size=Key("vocab_size"),
           context=Key("n_positions"), d_ff=lambda c: count(c, "n_inner", 4 * count(c, "n_embd")), positions="learned", tied=TIED)
LLAMA = row(SIZES, biases(Key("attention_bias", False)), ffn_bias=Key("mlp_bias", False), head_dim=Key("head_dim", None),
            n_kv_heads=Key("num_key_value_heads", None), norm="rmsnorm", gated_ffn=True, tied=UNTIED)
# Mistral AI's configs mean 8 key/value heads where they name none, and Mistral's a window of 4,096 unless it is null.
MISTRAL = row(LLAMA, biases(False), n_kv_heads=Key("num_key_value_heads", 8), window=lambda c: c.get("sliding_window", 4096))
QWEN2 = row(LLAMA, biases(False), qkv_bias=True, layer_kinds=_kinds(),
            window=lambda c: c.get("sliding_window") if c.get("use_sliding_window") else None)
QWEN3 = row(LLAMA, ffn_bias=False, qk_norm="head", layer_kinds=_kinds(), window=QWEN2["window"])
LOCAL = row(n_experts=Key("num_local_experts"), top_k=Key("num_experts_per_tok"))
EXPERTS = row(n_experts=lambda c: Key("num_experts", c.get("num_local_experts") or REQUIRED)(c),      # two spellings
              top_k=Key("num_experts_per_tok"), d_expert=Key("moe_intermediate_size"), moe_layers=_sparse_step)
SHARED = row(d_shared=Key("shared_expert_intermediate_size"), shared_gate=True)
ROUTED = row(n_experts=Key("n_routed_experts"), top_k=Key("num_experts_per_tok"), d_expert=Key("moe_intermediate_size"),
             d_shared=_shared, moe_layers=_first_dense)
DEEPSEEK = row(LLAMA, ROUTED, ffn_bias=False, latent=_latent, n_kv_heads=None,
               head_dim=lambda c: count(c, "qk_nope_head_dim") + count(c, "qk_rope_head_dim"))
HYBRID = row(QWEN3, linear=_linear, layer_kinds=_kinds("linear", lambda c: count(c, "full_attention_interval", 4)),
             attention_gate=True, window=None)

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt_bigcode": row(GPT2, n_kv_heads=lambda c: 1 if c.get("multi_query", True) else count(c, "n_head")),
    "gpt_neox": row(SIZES, biases(Key("attention_bias", True)), ffn_bias=True, tied=UNTIED),
    "opt": row(SIZES, biases(Key("enable_bias", True)), d_ff=Key("ffn_dim"), positions="learned", position_offset=2, tied=TIED,
               final_norm=lambda c: c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm", False),
               d_embed=lambda c: c.get("word_embed_proj_dim") if c.get("word_embed_proj_dim") != c["hidden_size"] else None),
    "bloom": row(biases(True), n_layers=Key("n_layer"), d_model=Key("hidden_size"), n_heads=Key("n_head"),
                 vocab_size=Key("vocab_size"), context=Key("seq_length", 2048), d_ff=lambda c: 4 * count(c, "hidden_size"),
                 positions="alibi", embedding_norm=True, tied=TIED),
    "falcon": row(SIZES, biases(Key("bias", False)), d_ff=lambda c: count(c, "ffn_hidden_size", 4 * count(c, "hidden_size")),
                  context=Key("max_position_embeddings", 2048), n_kv_heads=_falcon_kv, norms_per_layer=_falcon_norms,
                  positions=lambda c: "alibi" if c.get("alibi") else "rotary", tied=TIED),
    "llama": LLAMA, "mistral": MISTRAL,
    "mixtral": row(MISTRAL, LOCAL, window=Key("sliding_window", None)),
    "qwen2": QWEN2,
    "qwen2_moe": row(QWEN2, EXPERTS, SHARED, qkv_bias=Key("qkv_bias", True)),
    "qwen3": QWEN3, "qwen3_moe": row(QWEN3, EXPERTS),
    "qwen3_vl_text": QWEN3, "qwen3_vl_moe_text": row(QWEN3, EXPERTS),
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": row(HYBRID, EXPERTS, SHARED, d_ff=0, moe_layers=None),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa"), DEEPSEEK),
    "dbrx": row(n_layers=Key("n_layers"), d_model=Key("d_model"), n_heads=Key("n_heads"), vocab_size=Key("vocab_size"),
                context=Key("max_seq_len"), n_kv_heads=_nested("attn_config", "kv_n_heads"), gated_ffn=True,
                d_ff=_nested("ffn_config", "ffn_hidden_size"), n_experts=_nested("ffn_config", "moe_num_experts"),
                top_k=_nested("ffn_config", "moe_top_k"), norm="layernorm_nobias", tied=UNTIED),
    "gpt_oss": row(LLAMA, LOCAL, biases(Key("attention_bias", True)), ffn_bias=False, sinks=True, window=Key("sliding_window"),
                   layer_kinds=_kinds("window"), expert_bias=True, router_bias=True),
    "glm4_moe": row(LLAMA, ROUTED, out_bias=False, ffn_bias=False,
                     qk_norm=lambda c: "head" if c.get("use_qk_norm") else "none"),
    "minimax_m2": row(LLAMA, LOCAL, biases(False), qk_norm="full"),
    "llama4_text": row(LLAMA, LOCAL, ffn_bias=False, d_ff=Key("intermediate_size_mlp"), d_expert=Key("intermediate_size"),
                       d_shared=Key("intermediate_size"), moe_layers=_interleaved, layer_kinds=_chunked,
                       window=Key("attention_chunk_size")),
    "olmo2": row(LLAMA, ffn_bias=False, qk_norm="full"),
    "gemma2": row(LLAMA, ffn_bias=False, norms_per_layer=4, window=Key("sliding_window"), layer_kinds=_kinds("window"),
                  tied=TIED),
}


def _read(path: Path) -> Any:
    if path.is_dir():
        path = path / "config.json"
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"{path} is {size / 1e6:.0f} MB; a config.json is well under 1 MB, is this the right file?")
        return json.loads(path.read_text("utf8"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror}); give a config.json or a directory that holds one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}); give a Hugging Face config.json") from None


def from_hf(config: str | Path | Config) -> ModelSpec:
    """A ModelSpec from a config.json, a directory that holds one, or its dict.

    Raises ValueError, one line naming the field and what is accepted.
    """
    name = "config"
    if isinstance(config, (str, Path)):
        path = Path(config)
        name, config = (path.name if path.is_dir() else path.parent.name or path.stem) or str(path), _read(path)
    if not isinstance(config, Mapping):
        raise ValueError(f"the config is a {type(config).__name__}, not an object; give a Hugging Face config.json")
    name = str(config.get("_name_or_path") or "") or name
    config = config.get("text_config") or config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"model_type {model_type!r} is not read; {hint}accepted: {', '.join(FAMILIES)}")
    values = {field: look(config) if callable(look) else look for field, look in FAMILIES[model_type].items()}
    try:
        return ModelSpec(name=name, **values)
    except ValueError as e:
        raise ValueError(f"{model_type} config: {e}") from None
