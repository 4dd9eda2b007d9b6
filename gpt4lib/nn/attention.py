"""Attention layers built from a spec: multi-head, grouped-query and multi-query are one module."""

import torch
from torch import Tensor, nn

from gpt4lib.kernels.attention import attention
from gpt4lib.nn.cache import Cache
from gpt4lib.nn.numerics import Numerics
from gpt4lib.specs.model import ModelSpec


Rotary = tuple[Tensor, Tensor]          # cosine and sine of each position's angles


def rotary(spec: ModelSpec, numerics: Numerics, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
    """What the layers of a pass turn their queries and keys by, worked out once; `positions` is [tokens] or [batch, tokens].
    None where a model has no rotary positions."""
    if spec.positions != "rotary" and spec.latent is None:
        return None
    half = (spec.head_dim if spec.latent is None else spec.latent.rope_dim) // 2
    angle = positions[..., None] * numerics.rotary_rates(half, positions.device)     # [.., tokens, width / 2]
    angle = angle[:, None] if angle.dim() == 3 else angle                            # the same for every head
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: Rotary) -> Tensor:
    """Rotary positions on [batch, heads, tokens, width]. Channel i is paired with i + width / 2, as in Llama."""
    half, (cos, sin) = x.shape[-1] // 2, (t.to(x.dtype) for t in turn)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Softmax attention with n_heads query heads over n_kv_heads key/value heads.

    x [batch, tokens, d_model] -> the same shape. Shazeer 2019, arXiv:1911.02150 (one key/value head);
    Ainslie et al. 2023, arXiv:2305.13245 (groups).
    """
    core = staticmethod(attention)               # what is left without a cache; recomputation wraps it

    def __init__(self, spec: ModelSpec, layer: int, numerics: Numerics = Numerics()) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.window = spec.window if spec.layer_kinds[layer] == "window" else None
        width = spec.q_width * (2 if spec.attention_gate else 1)
        self.query = nn.Linear(spec.d_model, width, bias=spec.qkv_bias)
        self.key = nn.Linear(spec.d_model, spec.kv_width, bias=spec.qkv_bias)
        self.value = nn.Linear(spec.d_model, spec.kv_width, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.q_width, spec.d_model, bias=spec.out_bias)
        full = spec.qk_norm == "full"
        self.q_norm = self.k_norm = nn.Identity()
        if spec.qk_norm != "none":
            self.q_norm = nn.RMSNorm(spec.q_width if full else spec.head_dim, eps=numerics.norm_eps)
            self.k_norm = nn.RMSNorm(spec.kv_width if full else spec.head_dim, eps=numerics.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(spec.n_heads)) if spec.sinks else None

    def forward(self, x: Tensor, cache: Cache | None, turn: Rotary | None) -> Tensor:
        s = self.spec
        batch, tokens, _ = x.shape
        gate = None
        q, k, v = self.query(x), self.key(x), self.value(x)
        if s.attention_gate:
            q, gate = q.chunk(2, -1)
        if s.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(batch, tokens, -1, s.head_dim).transpose(1, 2) for t in (q, k, v))
        if s.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = (self.core(q, k, v, window=self.window, sinks=self.sinks) if cache is None else
             cache.attend(self.layer, q, k, v, self.window, self.sinks))
        y = y.transpose(1, 2).reshape(batch, tokens, s.q_width)
        return self.out(y if gate is None else y * gate.sigmoid())


class LatentAttention(nn.Module):
    """Multi-head latent attention, written out: keys and values rebuilt from a cached latent.

    x [batch, tokens, d_model] -> the same shape; the cache holds kv_rank + rope_dim numbers a token.
    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1, equations 9-19.
    """
    core = staticmethod(attention)

    def __init__(self, spec: ModelSpec, layer: int, numerics: Numerics = Numerics()) -> None:
        super().__init__()
        self.spec, self.layer, m = spec, layer, spec.latent
        if m.indexer is not None:
            raise ValueError("latent.indexer is not built; its parameters can be counted, not run")
        width = spec.n_heads * (m.nope_dim + m.rope_dim)
        self.query = nn.Linear(spec.d_model, width, bias=False) if m.q_rank is None else nn.Sequential(
            nn.Linear(spec.d_model, m.q_rank, bias=spec.qkv_bias), nn.RMSNorm(m.q_rank, eps=numerics.norm_eps),
            nn.Linear(m.q_rank, width, bias=False))
        self.down = nn.Linear(spec.d_model, m.kv_rank + m.rope_dim, bias=spec.qkv_bias)
        self.norm = nn.RMSNorm(m.kv_rank, eps=numerics.norm_eps)
        self.up = nn.Linear(m.kv_rank, spec.n_heads * (m.nope_dim + m.v_dim), bias=False)
        self.out = nn.Linear(spec.n_heads * m.v_dim, spec.d_model, bias=spec.out_bias)

    def forward(self, x: Tensor, cache: Cache | None, turn: Rotary | None) -> Tensor:
        m, heads = self.spec.latent, self.spec.n_heads
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, heads, -1).transpose(1, 2)
        q = torch.cat([q[..., :m.nope_dim], rotate(q[..., m.nope_dim:], turn)], -1)
        latent, rope = self.down(x).split([m.kv_rank, m.rope_dim], -1)
        latent = torch.cat([self.norm(latent)[:, None], rotate(rope[:, None], turn)], -1)
        y = self.attend(q, latent) if cache is None else cache.apply(self.layer, self.attend, q, latent)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))

    def attend(self, q: Tensor, latent: Tensor) -> Tensor:
        """q [batch, heads, queries, nope_dim + rope_dim], latent [batch, 1, keys, kv_rank + rope_dim] -> [.., v_dim]."""
        m, heads = self.spec.latent, self.spec.n_heads
        latent, rope = latent.split([m.kv_rank, m.rope_dim], -1)
        kv = self.up(latent[:, 0]).view(len(q), -1, heads, m.nope_dim + m.v_dim).transpose(1, 2)
        k = torch.cat([kv[..., :m.nope_dim], rope.expand(-1, heads, -1, -1)], -1)
        return self.core(q, k, kv[..., m.nope_dim:])
