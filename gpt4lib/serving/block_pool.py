"""The KV cache as fixed-size blocks with reference counts. Kwon et al. 2023, arXiv:2309.06180, section 4."""

from array import array
from collections import OrderedDict
from hashlib import blake2b
from typing import Sequence

from gpt4lib.specs.checks import require


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: of its tokens and of all before them, so equal keys mean equal keys and values."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """n_blocks of block_size tokens each. A block is free when nobody refers to it; free + used == total.

    A full block can be given a key under which later sequences find it. A free block keeps its key until it is needed:
    those without one are handed out first, then the one that has been free longest.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        for name, value in (("n_blocks", n_blocks), ("block_size", block_size)):
            require(type(value) is int and value >= 1, f"{name}={value!r} is not accepted; give an integer >= 1")
        self.block_size, self.n_blocks = block_size, n_blocks
        self._references = [0] * n_blocks
        self._free = OrderedDict.fromkeys(range(n_blocks))
        self._block: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that n_tokens need."""
        return -(-n_tokens // self.block_size)

    def references(self, block: int) -> int:
        """How often sequences refer to the block."""
        return self._references[block]

    def allocate(self) -> int:
        """A free block, now referred to once and without a key; ValueError when there is none."""
        if not self._free:
            raise ValueError(f"no free block among {self.n_blocks}; ask n_free first, or release one")
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block in use, or to a free one that still has its key."""
        if not self._references[block]:
            require(block in self._key, f"block {block} is free and cannot be shared; allocate it first")
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        require(self._references[block] > 0, f"block {block} is already free; it was released twice")
        self._references[block] -= 1
        if not self._references[block]:
            self._free[block] = None
            if block not in self._key:
                self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Let a full block, now computed, be found; where another already holds the same tokens, that one stays."""
        if key not in self._block and block not in self._key:
            self._block[key], self._key[block] = block, key

    def find(self, key: bytes) -> int | None:
        """The block that holds the tokens of this key, in use or free."""
        return self._block.get(key)

    def forget(self, block: int) -> None:
        """Nobody finds this block any more."""
        if (key := self._key.pop(block, None)) is not None:
            del self._block[key]
