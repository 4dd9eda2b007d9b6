"""A decoder-only transformer built from a ModelSpec: small enough to read, complete enough to count."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt4lib.nn.attention import Attention, LatentAttention, Rotary, rotary
from gpt4lib.nn.cache import Cache, KVCache
from gpt4lib.nn.moe import FeedForward, MoE
from gpt4lib.nn.numerics import Numerics
from gpt4lib.specs.model import ModelSpec

NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm, "layernorm_nobias": partial(nn.LayerNorm, bias=False)}


def initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A parameter's first value, fp32: matrices from N(0, 0.02), gains one, biases and sinks zero."""
    if name.endswith(("bias", "sinks")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return 0.02 * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


class Block(nn.Module):
    """One layer: attention and a feed-forward block or mixture, each added to the residual stream.

    norms_per_layer 2 normalises before each, 4 also after each (Gemma 2), 1 feeds both from the same
    normalised input in parallel (GPT-J, PaLM).
    """

    def __init__(self, spec: ModelSpec, layer: int, numerics: Numerics) -> None:
        super().__init__()
        self.attention = (LatentAttention if spec.latent else Attention)(spec, layer, numerics)
        self.moe = MoE(spec, numerics) if spec.is_moe_layer(layer) else None
        self.ffn = None if self.moe else FeedForward(spec.d_model, spec.d_ff, spec.gated_ffn, spec.ffn_bias, numerics.gelu)
        self.norms = nn.ModuleList(NORMS[spec.norm](spec.d_model, numerics.norm_eps) for _ in range(spec.norms_per_layer))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.moe(x) if self.ffn is None else self.ffn(x)

    def forward(self, x: Tensor, cache: Cache | None, turn: Rotary | None) -> Tensor:
        if len(self.norms) == 1:
            y = self.norms[0](x)
            return x + self.attention(y, cache, turn) + self.feed_forward(y)
        before, *rest = self.norms
        after_attention, middle, after_ffn = rest if len(rest) == 3 else (nn.Identity(), rest[0], nn.Identity())
        x = x + after_attention(self.attention(before(x), cache, turn))
        return x + after_ffn(self.feed_forward(middle(x)))


class Transformer(nn.Module):
    """The whole model. tokens, int64 [batch, tokens] -> logits [batch, tokens, vocab_size].

    The weights are drawn from `seed` alone. Raises ValueError, one line, for what a spec can say and
    this module does not build.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0, numerics: Numerics = Numerics()) -> None:
        super().__init__()
        _refuse_what_is_not_built(spec)
        self.spec, self.numerics = spec, numerics
        norm = partial(NORMS[spec.norm], spec.d_model, numerics.norm_eps)
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        rows = spec.context + spec.position_offset
        self.positions = nn.Embedding(rows, spec.d_model) if spec.positions == "learned" else None
        self.embedding_norm = norm() if spec.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(spec, i, numerics) for i in range(spec.n_layers))
        self.final_norm = norm() if spec.final_norm else nn.Identity()
        self.head = None if spec.tied else nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(spec.vocab_size)) if spec.head_bias else None
        self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Every parameter in order from one generator; a meta model has nothing to draw."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, p in self.named_parameters():
            if not p.is_meta:
                p.copy_(initial(name, p.shape, generator))

    def forward(self, tokens: Tensor, cache: Cache | None = None, only: Tensor | None = None) -> Tensor:
        """`only`, int64: the tokens whose logits are wanted, instead of all."""
        n = tokens.shape[1]
        end = n if cache is None else cache.end(n)
        if end > self.spec.context:
            raise ValueError(f"{end} tokens do not fit in context={self.spec.context}; shorten the prompt or build the model "
                             f"from a spec with a longer context")
        positions = torch.arange(n, device=tokens.device) if cache is None else cache.positions(n, tokens.device)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions + self.spec.position_offset)
        x = self.embedding_norm(x)
        turn = rotary(self.spec, self.numerics, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cache, turn)
        if cache is not None:
            cache.advance(n)
        x = x if only is None else x[:, only]
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.final_norm(x), weight, self.head_bias)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_new: int, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Append n_new tokens: the most likely one at temperature 0, otherwise sampled.

        tokens [batch, prompt] -> [batch, prompt + n_new]; the prompt is read once, then one token a step.
        """
        cache, step = KVCache(), tokens
        for _ in range(n_new):
            logits = self.forward(step, cache)[:, -1]                  # [batch, vocab_size]
            step = (logits.argmax(-1, keepdim=True) if temperature == 0 else
                    torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            tokens = torch.cat([tokens, step], 1)
        return tokens


def _refuse_what_is_not_built(spec: ModelSpec) -> None:
    for bad, what, accepted in (
            ("linear" in spec.layer_kinds, "layer_kinds with 'linear'", "full or window"),
            (spec.positions in ("alibi", "relative"), f"positions={spec.positions!r}", "rotary, learned, none"),
            (spec.norms_per_layer not in (1, 2, 4), f"norms_per_layer={spec.norms_per_layer}", "1, 2, 4"),
            (spec.d_embed is not None, f"d_embed={spec.d_embed}", "an embedding as wide as d_model"),
            (spec.latent is not None and "window" in spec.layer_kinds, "latent attention with a window", "full"),
            (spec.positions == "rotary" and spec.head_dim % 2 == 1 and spec.latent is None,
             f"head_dim={spec.head_dim} with rotary positions", "an even head_dim")):
        if bad:
            raise ValueError(f"{spec.name}: {what} can be counted but is not built here; accepted: {accepted}")
