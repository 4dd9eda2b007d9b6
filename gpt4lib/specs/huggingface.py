"""From a Hugging Face config.json to a ModelSpec. A family is a row of a table, not a class.

Multimodal configs are read for their text decoder. Multi-token-prediction layers are not counted, as
`transformers` does not load them either. What decides a count is never guessed: a missing size is an error.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Mapping

from gpt4lib.specs import registry
from gpt4lib.specs.checks import require
from gpt4lib.specs.model import Indexer, LatentAttention, LinearAttention, ModelSpec

Config = Mapping[str, Any]
LARGEST_FILE = 1_000_000
REQUIRED = object()


def find(c: Config, key: str | list[str], default: Any = REQUIRED, inside: str = "", optional: bool = False) -> Any:
    """A key of a config, in either of two spellings; without a default it must be there."""
    held = find(c, inside) if inside else c
    spellings = [key] if isinstance(key, str) else key
    value = next((held[k] for k in spellings if held.get(k) is not None), None)
    if value is None and default is REQUIRED and not optional:
        raise ValueError(f"field {spellings[0]!r} is missing; a {c['model_type']} config needs it")
    return value if value is not None or optional else look(c, default)


def look(c: Config, entry: Any) -> Any:
    """What an entry of families.toml stands for in this config."""
    if not isinstance(entry, dict):
        return entry
    if "call" in entry:
        return CALLS[entry["call"]](c, **{name: value for name, value in entry.items() if name != "call"})
    return find(c, **entry)


def count(c: Config, name: str, default: Any = REQUIRED) -> int:
    """An integer field that takes part in arithmetic here, checked before it does."""
    value = find(c, name, default)
    require(type(value) is int and value >= 0, f"field {name!r}={value!r} is not accepted; give an integer >= 0")
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
    step, dense = count(c, "decoder_sparse_step", 1), find(c, "mlp_only_layers", ())
    return tuple(i for i, sparse in enumerate(_every(c, step)) if sparse and i not in dense)


def _interleaved(c: Config) -> tuple[int, ...]:
    step = count(c, "interleave_moe_layer_step")
    return tuple(find(c, "moe_layers", range(step - 1, count(c, "num_hidden_layers"), step or 1)))


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
    sizes = (find(c, k) for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    return LatentAttention(*sizes, q_rank=c.get("q_lora_rank"), indexer=indexer)


def _latent_head_dim(c: Config) -> int:
    return count(c, "qk_nope_head_dim") + count(c, "qk_rope_head_dim")


def _linear(c: Config) -> LinearAttention:
    return LinearAttention(*(find(c, "linear_" + k) for k in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")))


def _kinds(c: Config, rest: str | None = None, step: str = "") -> tuple[str, ...] | None:
    """Layer kinds from `layer_types`. Without it: every second layer, or every `step`-th, has full attention among those of
    kind `rest`, or none differs."""
    names = {"full_attention": "full", "sliding_attention": "window", "linear_attention": "linear", "chunked_attention": "window"}
    if listed := c.get("layer_types"):
        unknown = sorted({str(t) for t in listed} - set(names))
        require(not unknown, f"field 'layer_types' holds {unknown}; accepted: {', '.join(names)}")
        return tuple(names[t] for t in listed)
    last = _every(c, count(c, step, 4) if step else 2)
    return tuple("full" if full else rest for full in last) if rest else None


def _chunked(c: Config) -> tuple[str, ...]:
    """Llama 4: layers with rotary positions attend within a chunk, those without to everything."""
    last = _every(c, count(c, "no_rope_layer_interval", 4))
    return tuple("window" if rotary else "full" for rotary in c.get("no_rope_layers") or [not full for full in last])


def _shared_heads(c: Config, heads: str) -> int:
    """Key/value heads of Falcon and of what came from GPT-2: one, or in Falcon's later form as many as it says."""
    if c.get("new_decoder_architecture"):
        return count(c, "num_kv_heads", count(c, heads))
    return 1 if c.get("multi_query", True) else count(c, heads)


def _falcon_norms(c: Config) -> int:
    if c.get("new_decoder_architecture"):
        return count(c, "num_ln_in_parallel_attn", 2)
    return 1 if c.get("parallel_attn", True) else 2


def _either(c: Config, key: str, yes: Any, no: Any = None) -> Any:
    """One of two entries, whether a key is there and true or not."""
    return look(c, yes if c.get(key) else no)


def _mistral_window(c: Config) -> int | None:
    return c.get("sliding_window", 4096)


def _opt_final_norm(c: Config) -> bool:
    return c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm", False)


def _opt_embedding(c: Config) -> int | None:
    return c.get("word_embed_proj_dim") if c.get("word_embed_proj_dim") != c["hidden_size"] else None


def _four_times(c: Config, key: str) -> int:
    return 4 * count(c, key)


CALLS = {f.__name__.removeprefix("_"): f for f in (
    _first_dense, _sparse_step, _interleaved, _shared, _latent, _latent_head_dim, _linear, _kinds, _chunked, _shared_heads,
    _falcon_norms, _either, _mistral_window, _opt_final_norm, _opt_embedding, _four_times)}


def _families() -> dict[str, dict[str, Any]]:
    """families.toml with every row written out; names in capitals are parts of rows."""
    rows: dict[str, dict[str, Any]] = {}
    for name, row in registry.read("gpt4lib.specs", "families.toml").items():
        whole = {field: entry for base in (*(rows[b] for b in row.get("like", ())), row) for field, entry in base.items()}
        rows[name] = {field: entry for field, entry in whole.items() if field not in ("like", "without", *row.get("without", ()))}
    return {name: row for name, row in rows.items() if not name.isupper()}


FAMILIES = _families()


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
    values = {field: look(config, entry) for field, entry in FAMILIES[model_type].items()}
    try:
        return ModelSpec(name=name, **values)
    except ValueError as e:
        raise ValueError(f"{model_type} config: {e}") from None
