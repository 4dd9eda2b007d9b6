"""What a decoder-only transformer *is*: the numbers that decide its parameters, FLOPs and bytes."""

from dataclasses import dataclass, fields, replace
from typing import Any, Mapping

from gpt4lib.specs import registry
from gpt4lib.specs.checks import require, require_counts, require_known

LAYER_KINDS = ("full", "window", "linear")
POSITIONS = ("rotary", "learned", "relative", "alibi", "none")
NORMS = ("layernorm", "layernorm_nobias", "rmsnorm")
QK_NORMS = ("none", "head", "full")


@dataclass(frozen=True)
class Indexer:
    """Sparse-attention indexer beside latent attention: small heads that pick the keys to attend to.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1.
    """
    n_heads: int
    head_dim: int
    layers: int | None = None        # how many layers own one; None = every layer

    def __post_init__(self) -> None:
        require_counts(self, 1, "n_heads", "head_dim", prefix="indexer.")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values are rebuilt from one small cached vector.

    The cache holds `kv_rank + rope_dim` numbers a token, whatever the number of heads.
    `q_rank` None means queries are projected directly. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_rank: int | None = None
    indexer: Indexer | None = None

    def __post_init__(self) -> None:
        require_counts(self, 1, "kv_rank", "nope_dim", "v_dim", prefix="latent.")
        require_counts(self, 0, "rope_dim", prefix="latent.")
        if self.q_rank is not None:
            require_counts(self, 1, "q_rank", prefix="latent.")
        if isinstance(self.indexer, Mapping):                # a TOML table
            object.__setattr__(self, "indexer", Indexer(**self.indexer))


@dataclass(frozen=True)
class LinearAttention:
    """Gated delta-rule linear attention, used in hybrid stacks: a state of fixed size replaces the KV cache.

    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464; shapes as in Qwen3-Next.
    """
    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int

    def __post_init__(self) -> None:
        require_counts(self, 1, *(f.name for f in fields(self)), prefix="linear.")
        require(self.n_value_heads % self.n_key_heads == 0,
                f"linear.n_value_heads={self.n_value_heads} is not divisible by n_key_heads={self.n_key_heads}; "
                f"value heads are shared evenly among key heads")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. Everything that changes a parameter count is a field; nothing else is.

    Widths are in elements, `context` and `window` in tokens. `head_dim` may be set so that the query
    width `n_heads * head_dim` differs from `d_model`. Leave `n_kv_heads` and `head_dim` out for plain
    multi-head attention. `n_experts = 0` is a dense model; with experts, `moe_layers` says which layers
    route (None = all) and the others keep the dense `d_ff`.
    Raises ValueError, one line naming field, value and what is accepted.
    """
    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int                            # width of the dense feed-forward block
    vocab_size: int
    context: int                         # longest sequence, and the rows of a learned position table
    n_kv_heads: int | None = None        # None = n_heads (multi-head); 1 = multi-query
    head_dim: int | None = None          # None = d_model / n_heads
    # attention details
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"                # "head": one norm of head_dim; "full": of the whole width
    attention_gate: bool = False         # a sigmoid gate per query channel: doubles the query projection
    sinks: bool = False                  # one learned attention-sink logit per head
    window: int | None = None            # sliding window of the "window" layers
    layer_kinds: tuple[str, ...] | None = None   # None = all "full" (or all "window" if window is set)
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    # feed-forward details
    gated_ffn: bool = False              # True: gate, up and down (SwiGLU); False: up and down
    ffn_bias: bool = False
    # mixture of experts
    n_experts: int = 0
    top_k: int = 0
    d_expert: int | None = None          # None = d_ff
    d_shared: int = 0                    # total width of the always-on shared experts
    shared_gate: bool = False            # one sigmoid gate on the shared expert's output
    router_bias: bool = False
    expert_bias: bool = False
    moe_layers: tuple[int, ...] | None = None
    # positions, norms, head
    positions: str = "rotary"
    position_offset: int = 0             # extra rows of the learned table (OPT has 2)
    norm: str = "layernorm"
    norms_per_layer: int = 2
    embedding_norm: bool = False
    final_norm: bool = True
    d_embed: int | None = None           # token embedding width when projected to d_model (OPT-350m)
    tied: bool = True                    # the output head reuses the token embedding
    head_bias: bool = False

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), f"name={self.name!r} must be a non-empty string")
        require_counts(self, 1, "n_layers", "d_model", "n_heads", "vocab_size", "context")
        require_counts(self, 0, "d_ff", "n_experts", "top_k", "d_shared", "position_offset", "norms_per_layer")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        require_counts(self, 1, "n_kv_heads")
        require(self.n_heads % self.n_kv_heads == 0, f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"accepted: a divisor of n_heads, 1 for multi-query, n_heads for multi-head")
        if self.head_dim is None:
            require(self.d_model % self.n_heads == 0, f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                    f"change one of them or set head_dim explicitly")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        require_counts(self, 1, *(f for f in ("head_dim", "window", "d_expert", "d_embed") if getattr(self, f) is not None))
        for f, accepted in (("positions", POSITIONS), ("norm", NORMS), ("qk_norm", QK_NORMS)):
            require_known(f, getattr(self, f), accepted)
        for f in (f.name for f in fields(self) if f.type is bool):
            require(type(getattr(self, f)) is bool, f"{f}={getattr(self, f)!r} is not accepted; give true or false")
        self._check_experts()
        self._check_layers()

    def _check_experts(self) -> None:
        if self.n_experts == 0:
            require(self.top_k == 0 and self.d_shared == 0 and self.moe_layers is None, f"top_k={self.top_k}, d_shared="
                    f"{self.d_shared}, moe_layers={self.moe_layers} need n_experts >= 1; for a dense model leave them out")
            require(self.d_ff >= 1, f"d_ff={self.d_ff} is not accepted; a dense model needs d_ff >= 1")
            return
        require(1 <= self.top_k <= self.n_experts, f"top_k={self.top_k} is not accepted; give 1 to n_experts={self.n_experts}")
        if self.d_expert is None:
            object.__setattr__(self, "d_expert", self.d_ff)
        require_counts(self, 1, "d_expert")
        if self.moe_layers is not None:
            layers = tuple(self.moe_layers)
            object.__setattr__(self, "moe_layers", layers)
            require(all(type(i) is int and 0 <= i < self.n_layers for i in layers) and list(layers) == sorted(set(layers)),
                    f"moe_layers={layers} is not accepted; give increasing layer numbers "
                    f"between 0 and n_layers-1={self.n_layers - 1}")
        require(self.d_ff >= 1 or not self.n_dense_layers,
                f"d_ff={self.d_ff} is not accepted; {self.n_dense_layers} layers are dense and need d_ff >= 1")

    def _check_layers(self) -> None:
        kinds = ("window" if self.window else "full",) * self.n_layers if self.layer_kinds is None else tuple(self.layer_kinds)
        object.__setattr__(self, "layer_kinds", kinds)
        require(len(kinds) == self.n_layers,
                f"layer_kinds has {len(kinds)} entries; give one for each of the {self.n_layers} layers")
        unknown = sorted(set(kinds) - set(LAYER_KINDS))
        require(not unknown, f"layer_kinds holds {unknown}; accepted: {', '.join(LAYER_KINDS)}")
        for kind, give in (("window", "the window in tokens"), ("linear", "a LinearAttention")):
            require(kind not in kinds or getattr(self, kind) is not None,
                    f"layer_kinds holds {kind!r} but {kind} is not set; give {give}")

    # --- derived -----------------------------------------------------------------------------------
    @property
    def is_moe(self) -> bool:
        return self.n_experts > 0

    @property
    def n_moe_layers(self) -> int:
        if not self.is_moe:
            return 0
        return self.n_layers if self.moe_layers is None else len(self.moe_layers)

    @property
    def n_dense_layers(self) -> int:
        return self.n_layers - self.n_moe_layers

    def is_moe_layer(self, layer: int) -> bool:
        return self.is_moe and (self.moe_layers is None or layer in self.moe_layers)

    @property
    def q_width(self) -> int:
        """Width of the concatenated query heads, `n_heads * head_dim`; need not equal d_model."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the concatenated key heads (and of the value heads), `n_kv_heads * head_dim`."""
        return self.n_kv_heads * self.head_dim

    def with_(self, **changes: Any) -> "ModelSpec":
        """A copy with some fields changed, validated again.

        A new n_layers or window is spread over all layers when they are alike; where they differ,
        give layer_kinds and moe_layers too. head_dim, n_kv_heads and d_expert stay unless given.
        """
        if {"n_layers", "window"} & set(changes) and len(set(self.layer_kinds)) == 1:
            linear = self.layer_kinds[0] == "linear"
            changes.setdefault("layer_kinds", ("linear",) * changes.get("n_layers", self.n_layers) if linear else None)
        return replace(self, **changes)

    # --- where specs come from ---------------------------------------------------------------------
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Build from plain values (a TOML table); unknown keys are an error, never ignored."""
        values = dict(values)
        known = {f.name for f in fields(cls)}
        unknown = ", ".join(sorted(set(values) - known))
        require(not unknown, f"model {values.get('name')!r}: unknown field(s) {unknown}; accepted: {', '.join(sorted(known))}")
        missing = sorted({"name", "n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "context"} - set(values))
        require(not missing, f"model {values.get('name')!r}: missing field(s) {', '.join(missing)}")
        nested = {"latent": LatentAttention, "linear": LinearAttention}
        return cls(**values | {f: kind(**values[f]) for f, kind in nested.items() if isinstance(values.get(f), Mapping)})

    @classmethod
    def preset(cls, name: str) -> "ModelSpec":
        """A model shipped with the library, e.g. "gpt-4"; ValueError names the known ones."""
        return cls.from_dict({"name": name, **registry.load("models", name)})

    @staticmethod
    def presets() -> tuple[str, ...]:
        return registry.names("models")

    @classmethod
    def from_hf(cls, config: Any) -> "ModelSpec":
        """From a Hugging Face config.json, a directory that holds one, or its dict."""
        from gpt4lib.specs.huggingface import from_hf
        return from_hf(config)

    @classmethod
    def load(cls, model: str) -> "ModelSpec":
        """A preset name or a path to a config.json: what every command line accepts as MODEL."""
        from pathlib import Path
        if model in cls.presets():
            return cls.preset(model)
        if Path(model).exists():
            return cls.from_hf(model)
        raise ValueError(f"model {model!r} is neither a preset nor a file; presets: "
                         f"{', '.join(cls.presets())}; or give the path of a config.json")
