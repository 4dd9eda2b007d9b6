"""The model's side of a step: the blocks' memory, and one pass over whatever the scheduler put together."""

from contextlib import nullcontext
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from gpt4lib.kernels import decode, support
from gpt4lib.nn.cache import PagedKVCache, Pages, RaggedKVCache, page_table
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.scheduler import Step, Work


class Executor:
    """A model, put in evaluation mode, with n_blocks of cache and one spare that nobody owns. Where a step of single tokens
    can be recorded as a CUDA graph, it runs as one."""

    def __init__(self, model: Transformer, n_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> None:
        weight = next(model.parameters())
        self.model, self.spare = model.eval(), n_blocks
        self.pages = Pages(model.spec, n_blocks + 1, block_size, dtype or weight.dtype, weight.device)
        self.graphs = None if why_no_graphs(model, self.pages) else DecodeGraphs(model, self.pages, self.spare, Recorder())

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """The logits after every piece that yields, in order: [pieces, vocab_size]."""
        work, size = step.work, self.pages.page_size
        with torch.cuda.device(self.pages.device) if self.pages.device.type == "cuda" else nullcontext():
            self.pages.clear([b for w in work for b in w.sequence.blocks[-(-w.start // size):-(-w.stop // size)]])     # begun now
            self.pages.copy(step.copies)
            if self.graphs and all(w.stop - w.start == 1 and w.yields for w in work):
                return self.graphs(work)
            return self._ragged(work)

    def _ragged(self, work: Sequence[Work]) -> Tensor:
        last, ends = [], 0
        for w in work:
            ends += w.stop - w.start
            if w.yields:
                last.append(ends - 1)
        cache = RaggedKVCache(self.pages, [(w.sequence.blocks, w.start, w.stop) for w in work], self.spare)
        tokens, last = (torch.tensor(x, dtype=torch.int64).to(self.pages.device) for x in (
            [t for w in work for t in w.sequence.tokens(w.start, w.stop)], last))
        return self.model(tokens[None], cache, last)[0]


def why_no_graphs(model: Transformer, pages: Pages) -> str | None:
    """Why the decode steps of a model cannot be recorded; None where they can: every kernel must run without asking the host."""
    spec, pool = model.spec, pages.pools[0]
    if spec.latent is not None or spec.sinks:
        return "latent attention and sinks are computed one sequence at a time"
    path, reason = decode.choose(pool.new_empty(1, spec.n_heads, 1, spec.head_dim), pool[0])
    if path != "triton":
        return reason
    if spec.is_moe and spec.expert_bias:
        return "the Triton kernels have no expert biases"
    return support.why_not_triton(next(model.parameters())) if spec.is_moe else None


class Recorder:
    """Records calls as CUDA graphs that share one pool of memory: only one runs at a time, and its result is read before the next."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, result); every replay writes the result anew."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):                             # what is compiled or allocated once is so before
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


class DecodeGraphs:
    """One token for each of a batch, recorded once for every size that comes up and replayed for whatever fits it.

    A decode step of a large model is hundreds of kernels of a few microseconds; a graph launches them at once. Sizes are 1, 2,
    4, 8 and multiples of 16 sequences, by powers of two of their pages. Seats left over decode token 0 into the spare
    block. `record` makes the recording: anything that gives (replay, result).
    """

    def __init__(self, model: Transformer, pages: Pages, spare: int,
                 record: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]) -> None:
        self.model, self.pages, self.spare, self.record = model, pages, spare, record
        self.recorded: dict[tuple[int, int], tuple[Tensor, PagedKVCache, Callable[[], None], Tensor]] = {}

    def __call__(self, work: Sequence[Work]) -> Tensor:
        """The logits of each, [len(work), vocab_size]."""
        n, longest = len(work), max(len(w.sequence.blocks) for w in work)
        seats, width = 1 << (n - 1).bit_length() if n <= 8 else -(-n // 16) * 16, max(1 << (longest - 1).bit_length(), 8)
        if (seats, width) not in self.recorded:
            self.recorded[seats, width] = self._new(seats, width)
        tokens, cache, replay, logits = self.recorded[seats, width]
        empty = seats - n
        cache.table.copy_(page_table([*(w.sequence.blocks for w in work), *[()] * empty], width, self.spare))
        cache.lengths.copy_(torch.tensor([w.start for w in work] + [0] * empty, dtype=torch.int32))
        tokens.copy_(torch.tensor([w.sequence.tokens(w.start, w.stop) for w in work] + [[0]] * empty))
        replay()
        return logits[:n, -1]

    def _new(self, seats: int, width: int) -> tuple[Tensor, PagedKVCache, Callable[[], None], Tensor]:
        device = self.pages.device
        tokens = torch.zeros(seats, 1, dtype=torch.int64, device=device)
        table = torch.full((seats, width), self.spare, dtype=torch.int32, device=device)
        cache = PagedKVCache(self.model.spec, 0, self.pages.page_size, table, pages=self.pages)
        return tokens, cache, *self.record(lambda: self.model(tokens, cache))
