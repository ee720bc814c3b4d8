"""Peak memory of tensors, on a GPU or on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """Context manager; `bytes` is the most memory that tensors had at one time on a device.

    On CUDA the caching allocator's count. On a CPU every operation's results are tracked until
    they are freed, which is slow; of earlier tensors only those in `known` count.
    """

    def __init__(self, device: torch.device, known: Iterable[torch.Tensor] = ()) -> None:
        self._device = device
        self._live = LiveBytes(known) if device.type != "cuda" else None

    def __enter__(self) -> Peak:
        if self._live is None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    @property
    def bytes(self) -> int:
        live = self._live
        return torch.cuda.max_memory_allocated(self._device) if live is None else live.peak


class LiveBytes(TorchDispatchMode):
    """Context manager; bytes of the storages that operations create (`now`) and their `peak`.

    known: earlier tensors that count from the start.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._storages: set[int] = set()
        self.now = self.peak = 0
        for tensor in known:
            self._follow(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # A view and a result in place have a storage that existed before.
        before = {_address(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and _address(tensor) not in before:
                self._follow(tensor)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        # Tensors on the meta device have a size and no bytes.
        if address in self._storages or tensor.is_meta:
            return
        size = storage.nbytes()
        self._storages.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self.now -= size


def _address(tensor: torch.Tensor) -> int:
    # Of the storage object, not of its memory: empty storages have none.
    return int(tensor.untyped_storage()._cdata)
