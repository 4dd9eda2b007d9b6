"""What autograd keeps for the backward pass: the activations, counted as memory and not as tensors."""

from typing import Iterable

from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks


class Kept:
    """Counts the distinct storages that the forward passes of `layers` leave for backward ones, parameters apart::

        kept = Kept(model.layers)
        model(tokens).sum().backward()
        kept.peak          # bytes

    What is recomputed keeps nothing and is not seen. The layers stay wrapped.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        self.now: dict[int, tuple[int, int]] = {}         # address of a storage -> (its bytes, how often it is kept)
        self.peak = 0
        self.known = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
        for layer in layers:
            layer.forward = self._hooked(layer.forward)

    def _hooked(self, run):
        def forward(*args):
            with saved_tensors_hooks(lambda x: _Box(self, x), lambda box: box.tensor):
                return run(*args)
        return forward

    def add(self, storage: UntypedStorage, times: int) -> None:
        if (key := storage.data_ptr()) in self.known:
            return
        size, count = self.now.pop(key, (storage.nbytes(), 0))
        if count + times:
            self.now[key] = size, count + times
        self.peak = max(self.peak, sum(size for size, _ in self.now.values()))


class _Box:
    """What autograd holds in a tensor's place, and lets go of with it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.kept.add(self.tensor.untyped_storage(), -1)
