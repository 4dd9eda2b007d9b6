"""Text and code that every Python carries, as bytes: enough to train a small model on without fetching anything."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256


def documents() -> dict[str, bytes]:
    """Name -> bytes: the topics of Python's own documentation, and the top-level modules of its standard library."""
    from pydoc_data.topics import topics
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return {**{f"topic {name}": text.encode() for name, text in sorted(topics.items())},
            **{f"module {path.stem}": path.read_bytes() for path in modules}}


def split(held_out: int = 10) -> tuple[Tensor, Tensor]:
    """(training, validation) bytes, uint8; a document is held out when its name's hash falls in one of `held_out` parts."""
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name, text in documents().items():
        parts[hashlib.sha256(name.encode()).digest()[0] % held_out == 0].append(text)
    return tuple(torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8) for texts in parts)


def read(path: str | Path) -> Tensor:
    """A file of tokens, mapped into memory, not read: uint16 when it ends in .bin, plain bytes otherwise."""
    path = Path(path)
    kind = torch.uint16 if path.suffix == ".bin" else torch.uint8
    size = path.stat().st_size // kind.itemsize
    if not size:
        raise ValueError(f"{path} holds no tokens; give a file of bytes, or of uint16 tokens that ends in .bin")
    return torch.from_file(str(path), shared=False, size=size, dtype=kind)


def windows(data: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n random stretches of length + 1 bytes, int64 [n, length + 1]: inputs and, one further, what follows them."""
    return at(data, torch.randint(len(data) - length, (n,), generator=generator), length)


def at(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """The stretches of length + 1 tokens that begin at `starts`, int64 [len(starts), length + 1]."""
    return data[starts[:, None] + torch.arange(length + 1)].long()
