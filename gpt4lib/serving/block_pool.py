"""The KV cache as fixed-size blocks with reference counts. Kwon et al. 2023, arXiv:2309.06180, section 4."""


class BlockPool:
    """n_blocks of block_size tokens each. A block is free when nobody refers to it; free + used == total."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        for name, value in (("n_blocks", n_blocks), ("block_size", block_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not accepted; give an integer >= 1")
        self.block_size = block_size
        self._references = [0] * n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that n_tokens need."""
        return -(-n_tokens // self.block_size)

    def allocate(self) -> int:
        """A free block, now referred to once; ValueError when there is none."""
        if not self._free:
            raise ValueError(f"no free block among {len(self._references)}; ask n_free first, or release one")
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block in use."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is free and cannot be shared; allocate it first")
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is already free; it was released twice")
        self._references[block] -= 1
        if not self._references[block]:
            self._free.append(block)
