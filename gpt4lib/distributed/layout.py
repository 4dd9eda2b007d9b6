"""Which part of every parameter a rank holds, and the part of the model that it builds from those."""

import re
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt4lib.distributed.expert import ParallelExperts
from gpt4lib.distributed.grid import Groups
from gpt4lib.distributed.tensor import (PartialLinear, enter, leave, region, vocab_parallel_cross_entropy,
                                        vocab_parallel_embedding)
from gpt4lib.nn.attention import rotary
from gpt4lib.nn.numerics import Numerics
from gpt4lib.nn.transformer import Transformer, initial
from gpt4lib.specs import ModelSpec, ParallelPlan

REGIONS = re.compile(r"\.(attention|ffn|moe)\.")
# The first pattern that matches a parameter's name says along which dimension tensor parallelism cuts it.
CUTS = ((r"\.query\.[01]\.", None), (r"attention\.(query|key|value|up)\.", 0), (r"attention\.out\.weight", 1), (r"\.sinks", 0),
        (r"(ffn|shared)\.(gate|up)\.", 0), (r"(ffn|shared)\.down\.weight", 1),
        (r"experts\.(w_in|in_bias)", 1), (r"experts\.w_out", 2), (r"^(embedding|head)\.weight|^head_bias", 0))


class Cut(NamedTuple):
    """Part `index` of `count` of a dimension; of each of its `blocks` equal parts (gate and up rows are cut alike)."""
    dim: int
    index: int
    count: int
    blocks: int = 1


class Chunk(NamedTuple):
    """A box of the full parameter, and where it lies in the local one (the sizes are the same)."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]


class Piece(NamedTuple):
    """What a rank holds of a parameter of `shape`. Its gradient is a sum over the ranks named in `partial`: replicas
    that each saw a part of the work. `owned` is true on exactly one of the ranks with the same piece in one replica."""
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    partial: tuple[str, ...] = ()
    owned: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.blocks * -(-shape[cut.dim] // cut.blocks // cut.count)
        return tuple(shape)

    def chunks(self) -> list[Chunk]:
        """The boxes it consists of, without the rows that pad the last rank's."""
        boxes = [Chunk((0,) * len(self.shape), self.shape, (0,) * len(self.shape))]
        for dim, index, count, blocks in self.cuts:
            block = self.shape[dim] // blocks
            size = -(-block // count)
            start = min(index * size, block)
            have = min(size, block - start)
            put = lambda t, v: (*t[:dim], v, *t[dim + 1:])                       # noqa: E731
            boxes = [Chunk(put(o, b * block + start), put(s, have), put(at, b * size))
                     for o, s, at in boxes for b in range(blocks)]
        return boxes

    def take(self, full: Tensor) -> Tensor:
        """This rank's copy of its part of the full parameter; padding is zero."""
        local = full.new_zeros(self.local_shape)
        for box in self.chunks():
            window(local, box.local, box.sizes).copy_(window(full, box.offsets, box.sizes))
        return local


def window(x: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return x[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]


def piece(name: str, shape: tuple[int, ...], spec: ModelSpec, plan: ParallelPlan, at: dict[str, int]) -> Piece:
    """The part of the parameter `name` on the rank at these coordinates of the grid."""
    cuts, shared, owned, tp = [], [], True, plan.tp
    dim = next((d for pattern, d in CUTS if re.search(pattern, name)), None)
    if ".experts." in name and plan.ep > 1:
        cuts.append(Cut(0, at["inner"], plan.ep))
    if tp > 1 and dim is not None:
        count = min(tp, spec.n_kv_heads) if re.search(r"attention\.(key|value)\.", name) else tp
        blocks = 2 if (spec.gated_ffn and "experts." in name and dim == 1) or (spec.attention_gate and ".query." in name) else 1
        cuts.append(Cut(dim, at["tp"] * count // tp, count, blocks))
        shared, owned = (["kv"] if count < tp else []), at["tp"] % (tp // count) == 0
    elif tp > 1:
        shared, owned = (["tp"] if plan.sequence_parallel or REGIONS.search(name) else []), at["tp"] == 0
    if name == "embedding.weight" and spec.tied and plan.pp > 1:
        shared, owned = shared + ["ends"], owned and at["pp"] == 0
    return Piece(tuple(shape), tuple(cuts), tuple(shared), owned)


class Stage(nn.Module):
    """Consecutive layers of the model on one rank: tokens or hidden states in, hidden states or logits out.

    Names of parameters are those of the whole model. Hidden states are [micro_batch, tokens, d_model], with sequence
    parallelism 1/tp of the tokens; logits [micro_batch, tokens, ceil(vocab_size / tp)].
    """

    def __init__(self, whole: Transformer, layers: range, plan: ParallelPlan, groups: Groups) -> None:
        super().__init__()
        self.spec, self.numerics, self.plan, self.groups = whole.spec, whole.numerics, plan, groups
        self.split = plan.sequence_parallel and plan.tp > 1          # each rank has its part of the tokens
        self.first, self.last = layers.start == 0, layers.stop == whole.spec.n_layers
        self.embedding = whole.embedding if self.first or self.last and whole.head is None else None
        self.positions, self.embedding_norm = (whole.positions, whole.embedding_norm) if self.first else (None, None)
        self.layers = nn.ModuleDict({str(i): whole.layers[i] for i in layers})
        self.final_norm, self.head = (whole.final_norm, whole.head) if self.last else (None, None)
        self.register_parameter("head_bias", whole.head_bias if self.last else None)
        for layer in self.layers.values():
            self._adapt(layer)

    def _adapt(self, layer: nn.Module) -> None:
        tp, attention = self.plan.tp, layer.attention
        if tp > 1:
            attention.spec = self.spec.with_(n_heads=self.spec.n_heads // tp, n_kv_heads=max(self.spec.n_kv_heads // tp, 1))
            for module in (attention, layer.ffn or layer.moe):
                region(module, self.groups.tp, self.split)
            for name, module in layer.named_modules():
                if name.endswith(("attention.out", "ffn.down", "shared.down")) and module.bias is not None:
                    module.__class__, module.terms = PartialLinear, tp
        if self.plan.ep > 1 and layer.moe is not None:
            layer.moe.experts.__class__, layer.moe.experts.group = ParallelExperts, self.groups.inner
        if self.plan.recompute == "selective":
            attention.core = partial(checkpoint, attention.core, use_reentrant=False)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        group, weight = self.groups.tp, self.embedding.weight
        x = (F.embedding(tokens, weight) if group is None
             else leave(vocab_parallel_embedding(tokens, weight, group), group, self.split))
        if self.positions is not None:
            mine = positions.chunk(self.plan.tp)[self.groups.at["tp"]] if self.split else positions
            x = x + self.positions(mine + self.spec.position_offset)
        return self.embedding_norm(x)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1] * (self.plan.tp if self.split and not self.first else 1)
        positions = torch.arange(n, device=x.device)
        if self.first:
            x = self._embed(x, positions)
        turn = rotary(self.spec, self.numerics, positions, x.dtype)
        for layer in self.layers.values():
            x = (checkpoint(layer, x, None, turn, use_reentrant=False) if self.plan.recompute == "full"
                 else layer(x, None, turn))
        if not self.last:
            return x
        x = self.final_norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        x = x if self.groups.tp is None else enter(x, self.groups.tp, self.split)
        return F.linear(x, weight, self.head_bias)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a micro-batch, fp32 or better; the same on every tensor-parallel rank."""
        logits, targets = logits.flatten(0, 1), targets.flatten()
        if self.groups.tp is not None:
            return vocab_parallel_cross_entropy(logits, targets, self.groups.tp, self.spec.vocab_size).mean()
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def check(spec: ModelSpec, plan: ParallelPlan, seq_len: int) -> None:
    """ValueError, one line, for a plan that cannot hold this model or that is not built here."""
    plan.check(spec)
    for bad, what in ((plan.cp > 1, f"cp={plan.cp} can be predicted but is not built here; give cp 1"),
                      (plan.zero_stage == 2, "zero_stage=2 is not built here; accepted: 0, 1, 3"),
                      (plan.tp > 1 and spec.qk_norm == "full", "qk_norm='full' needs whole rows; give tp 1"),
                      (plan.tp > 1 and spec.expert_bias, "expert_bias with tp > 1 is not built here; give tp 1"),
                      (plan.sequence_parallel and seq_len % plan.tp,
                       f"seq_len={seq_len} is not divisible by tp={plan.tp}, which sequence parallelism needs"),
                      (seq_len > spec.context, f"seq_len={seq_len} does not fit in context={spec.context}")):
        if bad:
            raise ValueError(f"{spec.name}: {what}")


def build(spec: ModelSpec, plan: ParallelPlan, groups: Groups, *, seed: int = 0, numerics: Numerics = Numerics(),
          dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Stage], dict[str, Piece]]:
    """This rank's chunks of the model, in order, and the piece behind each of their parameters.

    The weights are those that `Transformer(spec, seed)` draws, whatever the plan: each rank draws every parameter
    in turn and keeps its part, so it never holds more than one full parameter.
    """
    with torch.device("meta"):
        whole = Transformer(spec, numerics=numerics)
    mine = [Stage(whole, layers, plan, groups) for layers in plan.chunks_of(spec.n_layers, groups.at["pp"])]
    held = {name for stage in mine for name, _ in stage.named_parameters()}
    pieces, generator = {}, torch.Generator().manual_seed(seed)
    for name, p in list(whole.named_parameters()):
        full = initial(name, p.shape, generator)
        if name in held:
            pieces[name] = piece(name, p.shape, spec, plan, groups.at)
            owner, _, leaf = name.rpartition(".")
            module = whole.get_submodule(owner) if owner else mine[-1]
            module._parameters[leaf] = nn.Parameter(pieces[name].take(full).to(device, dtype))
    return mine, pieces
