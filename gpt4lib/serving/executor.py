"""The model's side of a step: the blocks' memory, and one pass over whatever the scheduler put together."""

from typing import Callable, Sequence

import torch
from torch import Tensor

from gpt4lib.nn.cache import PagedKVCache, Pages, RaggedKVCache
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.scheduler import Step, Work


class Executor:
    """A model with n_blocks of cache, and one spare that nobody owns. On CUDA a step of single tokens runs as a graph."""

    def __init__(self, model: Transformer, n_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> None:
        weight = next(model.parameters())
        self.model, self.spare = model.eval(), n_blocks
        self.pages = Pages(model.spec, n_blocks + 1, block_size, dtype or weight.dtype, weight.device)
        graphs = weight.is_cuda and model.spec.latent is None and not model.spec.sinks
        self.graphs = DecodeGraphs(model, self.pages, self.spare, capture) if graphs else None

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """The logits after every piece that yields, in order: [pieces, vocab_size]."""
        self.pages.copy(step.copies)
        work = step.work
        if self.graphs and all(w.stop - w.start == 1 and w.yields for w in work):
            return self.graphs(work)
        tokens = [t for w in work for t in w.sequence.tokens(w.start, w.stop)]
        last, ends = [], 0
        for w in work:
            ends += w.stop - w.start
            if w.yields:
                last.append(ends - 1)
        cache = RaggedKVCache(self.pages, [(w.sequence.blocks, w.start, w.stop) for w in work], self.spare)
        tokens, last = (torch.tensor(x, dtype=torch.int64, device=self.pages.device) for x in (tokens, last))
        return self.model(tokens[None], cache, last)[0]

    def clear(self, blocks: list[int]) -> None:
        """Zero the content of blocks."""
        with torch.inference_mode():
            self.pages.clear(blocks)


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(replay, result) of a call recorded as a CUDA graph, whose result every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):                                 # what is compiled or allocated once is so before
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


class DecodeGraphs:
    """One token for each of a batch, recorded once for every power of two and replayed for batches up to it.

    A decode step of a large model is hundreds of kernels of a few microseconds; a graph launches them at once. Seats
    left over decode token 0 in the spare block. `capture` makes the recording: anything that returns (replay, result).
    """

    def __init__(self, model: Transformer, pages: Pages, spare: int, capture: Capture) -> None:
        self.model, self.pages, self.spare, self.capture = model, pages, spare, capture
        self.width = -(-model.spec.context // pages.page_size)
        self.recorded: dict[int, tuple[Tensor, PagedKVCache, Callable[[], None], Tensor]] = {}

    def __call__(self, work: Sequence[Work]) -> Tensor:
        """The logits of each, [len(work), vocab_size]."""
        bucket = 1 << (len(work) - 1).bit_length()
        if bucket not in self.recorded:
            self.recorded[bucket] = self._record(bucket)
        tokens, cache, replay, logits = self.recorded[bucket]
        empty = bucket - len(work)
        rows = [(*w.sequence.blocks, *[self.spare] * (self.width - len(w.sequence.blocks))) for w in work]
        cache.table.copy_(torch.tensor(rows + [(self.spare,) * self.width] * empty, dtype=torch.int32))
        cache.lengths.copy_(torch.tensor([w.start for w in work] + [0] * empty, dtype=torch.int32))
        tokens.copy_(torch.tensor([w.sequence.tokens(w.start, w.stop) for w in work] + [[0]] * empty))
        replay()
        return logits[:len(work), -1]

    def _record(self, bucket: int) -> tuple[Tensor, PagedKVCache, Callable[[], None], Tensor]:
        device = self.pages.device
        tokens = torch.zeros(bucket, 1, dtype=torch.int64, device=device)
        table = torch.full((bucket, self.width), self.spare, dtype=torch.int32, device=device)
        cache = PagedKVCache(self.model.spec, 0, self.pages.page_size, table, pages=self.pages)
        return tokens, cache, *self.capture(lambda: self.model(tokens, cache))
