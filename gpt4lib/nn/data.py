"""Text and code that every Python carries, as bytes: enough to train a small model on without fetching anything."""

import bisect
import hashlib
import itertools
import random
import sysconfig
from pathlib import Path
from typing import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gpt4lib.specs.checks import require

VOCAB_SIZE = 256
END = b"\0"         # closes a document: no text holds it


def documents() -> dict[str, bytes]:
    """Name -> bytes: the topics of Python's own documentation, and the top-level modules of its standard library."""
    from pydoc_data.topics import topics
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return {**{f"topic {name}": text.encode() for name, text in sorted(topics.items())},
            **{f"module {path.stem}": path.read_bytes() for path in modules}}


def _held_out(name: str, parts: int) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % parts == 0


def split(held_out: int = 10) -> tuple[Tensor, Tensor]:
    """(training, validation) bytes, uint8; a document is held out when its name's hash falls in one of `held_out` parts."""
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name, text in documents().items():
        parts[_held_out(name, held_out)].append(text)
    return tuple(torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8) for texts in parts)


def sources(held_out: int = 10) -> dict[str, list[bytes]]:
    """The training documents of `split` in two sources: "text", the topics, and "code", the modules."""
    found: dict[str, list[bytes]] = {"text": [], "code": []}
    for name, text in documents().items():
        if not _held_out(name, held_out):
            found["text" if name.startswith("topic") else "code"].append(text)
    return found


class Mixture:
    """Sources of documents, each read whole a number of times, as one line of tokens that readers share and resume.

    sources: name -> documents; epochs: name -> how often. Every epoch has its own shuffle, and the sources are merged so
    that all are equally far, by documents, at any time. Windows of `length` tokens are cut from the line as it runs, across
    documents: nothing is padded, and unread is only what does not fill the last window. Nothing is kept between calls:
    the number of windows read so far is all there is to save.
    Raises ValueError when a source is empty, has no number of epochs, or all together do not fill a window.
    """

    def __init__(self, sources: Mapping[str, Sequence[bytes]], epochs: Mapping[str, int], length: int, seed: int = 0) -> None:
        require(sources.keys() == epochs.keys() and all(sources.values()),
                f"epochs for {sorted(epochs)} do not go with the sources {sorted(sources)}; name the same, none empty")
        for what, value in {**epochs, "length": length}.items():
            require(type(value) is int and value >= 1, f"{what}={value!r} is not accepted; give an integer >= 1")
        self.sources, self.length = sources, length
        order = []
        for name, documents in sources.items():
            for epoch in range(epochs[name]):
                shuffled = random.Random(f"{seed} {name} {epoch}").sample(range(len(documents)), len(documents))
                order += [((epoch + place / len(documents)) / epochs[name], name, which) for place, which in enumerate(shuffled)]
        self.order = [(name, which) for _, name, which in sorted(order)]
        self._ends = list(itertools.accumulate(len(sources[name][which]) + len(END) for name, which in self.order))
        require(len(self), f"{self._ends[-1:]} tokens do not fill a window of {length} + 1; give more, or a shorter length")

    def __len__(self) -> int:
        """Whole windows, each with the token that follows it."""
        return (self._ends[-1] - 1) // self.length if self._ends else 0

    def _between(self, start: int, stop: int) -> bytes:
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop)
        begin = self._ends[first - 1] if first else 0
        joined = b"".join(self.sources[name][which] + END for name, which in self.order[first:last + 1])
        return joined[start - begin:stop - begin]

    def rows(self, start: int, n: int,
             rank: int = 0, world_size: int = 1) -> Tensor:
        """This rank's share of `n` windows from number `start` on.

        int64 [about n / world_size, length + 1]; fewer at the end.
        """
        mine = range(start, min(start + n, len(self)))[rank::world_size]
        texts = [self._between(w * self.length, (w + 1) * self.length + 1)
                 for w in mine]
        rows = bytearray(b"".join(texts) + END)     # frombuffer wants a byte
        tokens = torch.frombuffer(rows, dtype=torch.uint8)[:-1]
        return tokens.view(-1, self.length + 1).long()

    def batches(self, size: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(the state to save once it is used, this rank's rows) for every global batch of `size` windows from `start` on."""
        for first in range(start, len(self), size):
            yield min(first + size, len(self)), self.rows(first, size, rank, world_size)

    def tokens_read(self, windows: int) -> dict[str, int]:
        """Source -> its tokens among the first `windows` windows; over the source's length, the epochs it has been through."""
        read, begin = dict.fromkeys(self.sources, 0), 0
        for (name, _), end in zip(self.order, self._ends):
            read[name] += max(min(end, windows * self.length) - begin, 0)
            begin = end
        return read


def read(path: str | Path) -> Tensor:
    """A file of tokens, mapped into memory, not read: uint16 when it ends in .bin, plain bytes otherwise."""
    path = Path(path)
    kind = torch.uint16 if path.suffix == ".bin" else torch.uint8
    size = path.stat().st_size // kind.itemsize
    require(size, f"{path} holds no tokens; give a file of bytes, or of uint16 tokens that ends in .bin")
    return torch.from_file(str(path), shared=False, size=size, dtype=kind)


def windows(data: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n random stretches of length + 1 bytes, int64 [n, length + 1]: inputs and, one further, what follows them."""
    return at(data, torch.randint(len(data) - length, (n,), generator=generator), length)


def at(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """The stretches of length + 1 tokens that begin at `starts`, int64 [len(starts), length + 1]."""
    return data[starts[:, None] + torch.arange(length + 1)].long()
