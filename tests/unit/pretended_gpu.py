"""A GPU that is only pretended: values are computed on the CPU, while tensors say that they lie on cuda:0.

    with PretendedGPU() as gpu:
        x = torch.zeros(3, device="cuda")  # x.device is cuda:0
        x + torch.ones(3)                  # raises DeviceMixed, as CUDA would
        float(x.sum())                     # a wait: the host stands still until the device has caught up
    print(gpu.waits)                       # Counter of (what, file:line)

Two modes share one set of books, the storages on the GPU. `PretendedGPU` sees calls from Python and answers what
depends on the device (`.device`, `.to`, `device=`, `torch.cuda`). `_Books` sees every operation underneath, backward
passes among them: results lie where their inputs do, inputs in two places are refused. As on a GPU, a tensor without
dimensions, an index from the CPU and `copy_` may cross; the last two wait, but for a pinned copy with `non_blocking`.

Not seen: compiled code, `vmap`, streams and graphs, memory, and how CUDA rounds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
GIB = 2**30
CROSSING_INDEX = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# The host needs their result, or the size of it.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "linalg_eigh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
PROPERTIES = SimpleNamespace(
    name="pretended",
    major=9,
    minor=0,
    multi_processor_count=1,
    L2_cache_size=2**25,
    total_memory=100 * GIB,
)
RUNTIME = {
    "_lazy_init": None,
    "current_device": 0,
    "device_count": 1,
    "empty_cache": None,
    "get_device_capability": (9, 0),
    "get_device_name": "pretended GPU",
    "get_device_properties": PROPERTIES,
    "is_available": True,
    "is_current_stream_capturing": False,
    "is_initialized": True,
    "max_memory_allocated": 1,
    "mem_get_info": (90 * GIB, 100 * GIB),
    "memory_allocated": 1,
    "reset_peak_memory_stats": None,
    "synchronize": None,
}
CAPTURE_CHECKS = (  # an optimiser asks the driver whether a graph is being captured
    "_cuda_graph_capture_health_check",
    "_accelerator_graph_capture_health_check",
)


class DeviceMixed(RuntimeError):
    """What a GPU would have refused."""


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _line() -> str:
    """The innermost line of ddlib or its benchmarks, else of anything but torch and this file."""
    frame, other = sys._getframe(2), ""
    while frame:
        path = Path(frame.f_code.co_filename)
        if "ddlib" in path.parts[:-1] or "benchmarks" in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        if not other and "torch" not in path.parts and path != Path(__file__):
            other = f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class _Storages:
    """A set of storages; weak references keep the address of a dead one from being taken for a new one."""

    def __init__(self) -> None:
        self._members: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._members[storage._cdata] = StorageWeakRef(storage)

    def discard(self, tensor: Tensor) -> bool:
        return self._members.pop(tensor.untyped_storage()._cdata, None) is not None

    def clear(self) -> None:
        self._members.clear()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._members

    def prune(self) -> None:
        self._members = {key: ref for key, ref in self._members.items() if not ref.expired()}

    def __len__(self) -> int:
        return len(self._members)


class _Books(TorchDispatchMode):
    """Which storages lie on the GPU, and what waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu, self.pinned, self.anywhere = _Storages(), _Storages(), _Storages()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.paused = self.backward = 0
        self.limit = 50_000

    @contextmanager
    def pause(self):
        """What runs inside is none of the program's own work."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def has(self, tensor: Tensor) -> bool:
        return _plain(tensor) and tensor in self.on_gpu

    def put(self, tensor: Tensor, on: bool) -> Tensor:
        if _plain(tensor):
            self.on_gpu.add(tensor) if on else self.on_gpu.discard(tensor)
        if len(self.on_gpu) > self.limit:
            self.on_gpu.prune()
            self.limit = 2 * len(self.on_gpu) + 50_000
        return tensor

    def wait(self, what: str) -> None:
        if not self.paused:
            self.waits[what, _line()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.paused or any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        for (
            tensor
        ) in tensors:  # made by a backward formula without inputs: it goes where it is used
            if any(map(self.has, tensors)) and _plain(tensor) and self.anywhere.discard(tensor):
                self.put(tensor, True)
        places = [self.has(tensor) for tensor in tensors]
        if any(places):
            self._check(func.overloadpacket.__name__, tensors, places, args, kwargs)
        result = func(*args, **kwargs)
        old = {t.untyped_storage()._cdata for t in tensors if _plain(t)}
        for tensor in tree_leaves(result):
            if _is_new(tensor, old):
                self.put(tensor, any(places))
                if self.backward and not tensors:
                    self.anywhere.add(tensor)
        return result

    def _check(self, name: str, tensors: list[Tensor], places: list[bool], args, kwargs) -> None:
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            raise DeviceMixed(f"{_line()}: {name} fills a CUDA tensor from a CPU generator")
        crossing = [t for t, on in zip(tensors, places, strict=True) if t.ndim and not on]
        if name in ("copy_", "_to_copy"):
            if crossing and not self._flows(crossing[0], args, kwargs):
                self.wait("copy")
        elif crossing and name in CROSSING_INDEX and places[0]:
            self.wait("index on the CPU")
        elif crossing:
            where = [f"{'cuda' if on else 'cpu'}{list(t.shape)}" for t, on in zip(tensors, places)]
            raise DeviceMixed(f"{_line()}: {name} of {', '.join(where)}")
        if name in WAITING:
            self.wait(name)
        if name in CROSSING_INDEX and any(t.dtype == torch.bool for t in tensors[1:] if t.ndim):
            self.wait("index by a mask")

    def _flows(self, tensor: Tensor, args: tuple, kwargs: dict) -> bool:
        return tensor in self.pinned and (True in args or kwargs.get("non_blocking", False))


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _is_new(value: Any, storages: set[int]) -> bool:
    known = not isinstance(value, Tensor) or not _plain(value)
    return not known and value.untyped_storage()._cdata not in storages


class PretendedGPU(TorchFunctionMode):
    """See the module. `waits` counts (what, line); a mixture of devices raises `DeviceMixed`."""

    def __init__(self) -> None:
        super().__init__()
        self.books, self._patches = _Books(), ExitStack()
        attribute = {name: getattr(Tensor, name).__get__ for name in ("device", "is_cuda")}
        reads = (
            Tensor.tolist,
            Tensor.item,
            Tensor.__float__,
            Tensor.__int__,
            Tensor.__bool__,
            Tensor.__index__,
        )
        self._rules: dict[Any, Callable] = dict.fromkeys(reads, self._read) | {
            attribute["device"]: self._device,
            attribute["is_cuda"]: lambda call, tensor: self.books.has(tensor),
            Tensor.get_device: lambda call, tensor: 0 if self.books.has(tensor) else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda call, tensor: self._moved(tensor, HOST),
            Tensor.cuda: lambda call, tensor, device=GPU: self._moved(tensor, GPU),
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
            Tensor.pin_memory: self._pin,
            Tensor.is_pinned: lambda call, tensor: tensor in self.books.pinned,
            torch.from_numpy: lambda call, array: self.books.put(call(array), False),
            torch.nn.functional.one_hot: self._one_hot,
            torch._C._nn.pad_sequence: self._padded,
            torch.autograd.grad: self._backward,
            torch.autograd.backward: self._backward,
            Tensor.backward: self._backward,
        }

    @property
    def waits(self) -> Counter[tuple[str, str]]:
        return self.books.waits

    def __enter__(self) -> Self:
        enter = self._patches.enter_context
        for name, value in RUNTIME.items():
            enter(patch.object(torch.cuda, name, lambda *_, value=value, **__: value))
        for name in CAPTURE_CHECKS:
            if hasattr(torch.optim.Optimizer, name):
                enter(patch.object(torch.optim.Optimizer, name, lambda self: None))
        enter(patch("torch.utils.checkpoint._infer_device_type", lambda *_: "cpu"))
        enter(patch.object(torch.nn.Module, "to", self._module_to(torch.nn.Module.to)))
        enter(self.books)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        rule = self._rules.get(func)
        if rule:
            return rule(func, *args, **kwargs)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if device is None:
            result = func(*args, **kwargs)
        else:
            result = self._made(func, torch.device(device), args, kwargs)
        if pinned:
            self.books.pinned.add(result)
        return result

    # Making tensors

    def _made(self, func: Callable, device: torch.device, args: tuple, kwargs: dict) -> Any:
        """A factory's tensor on `device`."""
        if device.type == "meta":
            return func(*args, **kwargs)
        on, copies = _is_gpu(device), func in (torch.tensor, torch.as_tensor, torch.asarray)
        if on and isinstance(kwargs.get("generator"), torch.Generator):
            raise DeviceMixed(f"{_line()}: {func.__name__} on CUDA from a CPU generator")
        if copies and isinstance(args[0], Tensor):
            rest = {key: value for key, value in kwargs.items() if key == "dtype"}
            return self._to(Tensor.to, args[0], device, **rest)
        if on and copies:
            self.books.wait("copy")
        with self.books.pause():
            result = func(*args, **kwargs | {"device": HOST})
        return self.books.put(result, on) if isinstance(result, Tensor) else result

    # Asking and moving

    def _device(self, call: Callable, tensor: Tensor) -> torch.device:
        return GPU if self.books.has(tensor) else call(tensor)

    def _moved(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        on, wanted = self.books.has(tensor), _is_gpu(device)
        if tensor.is_meta or on == wanted:
            return tensor
        if on or not (non_blocking and tensor in self.books.pinned):
            self.books.wait("copy")
        with self.books.pause():
            copy = tensor.clone()
        return self.books.put(copy, wanted)

    def _to(self, call: Callable, tensor: Tensor, *words: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms: a device, a dtype, both, or another tensor that has both."""
        device, other = kwargs.pop("device", None), kwargs.pop("other", None)
        non_blocking, flags = kwargs.pop("non_blocking", False), []
        for word in words:
            if isinstance(word, Tensor):
                other = word
            elif isinstance(word, torch.dtype):
                kwargs["dtype"] = word
            elif isinstance(word, bool):
                flags.append(word)
            elif word is not None:
                device = word
        if other is not None:
            device = GPU if self.books.has(other) else other.device  # no rule answers within a rule
            kwargs["dtype"] = other.dtype
        if device is not None and torch.device(device).type == "meta":
            return call(tensor, device, **kwargs)
        if device is not None:
            tensor = self._moved(tensor, torch.device(device), non_blocking or flags[:1] == [True])
        kwargs = {key: value for key, value in kwargs.items() if value not in (None, False)}
        return call(tensor, **kwargs) if kwargs else tensor

    def _module_to(self, to: Callable) -> Callable:
        """`Module.to(tensor)` reads the tensor's device in C++, where it is the CPU."""

        def module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
            if args and isinstance(args[0], Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            return to(module, *args, **kwargs)

        return module_to

    def _pin(self, call: Callable, tensor: Tensor) -> Tensor:
        if self.books.has(tensor):
            raise DeviceMixed(f"{_line()}: only a CPU tensor can be pinned")
        with self.books.pause():
            copy = tensor.clone()
        self.books.pinned.add(self.books.put(copy, False))
        return copy

    # Reading

    def _read(self, call: Callable, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.books.has(tensor):
            self.books.wait(call.__name__)
        with self.books.pause():
            return call(tensor, *args, **kwargs)

    def _numpy(self, call: Callable, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.books.has(tensor):
            raise DeviceMixed(f"{_line()}: a CUDA tensor becomes no array; use .cpu() first")
        return call(tensor, *args, **kwargs)

    def _one_hot(self, call: Callable, tensor: Tensor, num_classes: int = -1) -> Tensor:
        """On a CPU it reads its input to check it; on a GPU only to find the number of classes."""
        on = self.books.has(tensor)
        if on and num_classes < 0:
            self.books.wait("one_hot")
        with self.books.pause():
            return self.books.put(call(tensor, num_classes), on)

    def _padded(self, call: Callable, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Its output is made in C++, for the device that its inputs have there."""
        on = any(map(self.books.has, tensors))
        with self.books.pause():
            return self.books.put(call(tensors, *args, **kwargs), on)

    def _backward(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        self.books.backward += 1
        try:
            return call(*args, **kwargs)
        finally:
            self.books.backward -= 1
            self.books.anywhere.clear()
