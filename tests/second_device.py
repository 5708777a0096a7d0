"""A second device for a machine that has only a CPU: device bugs that a GPU would show, without one.

Its tensors are CPU tensors whose storage is marked: views, detached copies and what functorch wraps share the mark, and
values are those of the CPU, to the bit. Two modes watch. `_Operations` sees every operation of torch, those of backward
passes and transforms among them, and enforces what an accelerator does: operands share a device, but for numbers (0-d
tensors in elementwise operations), indices and copies. `_Python` sees what Python code asks for: it places what is
made, answers `tensor.device`, moves with `to` and `cpu`, and refuses `numpy()`. Reading a number (`item`, `bool`) is
fine, as on an accelerator.

A tensor that a test makes without saying where goes to the second device; one that the library makes without saying
where goes to the CPU, and is found out as soon as it meets anything else. Temporaries that torch makes inside an
operation belong to neither and join what they meet.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE, CPU = torch.device("cpu", 1), torch.device("cpu")  # torch takes the first for a CPU, and keeps the index
TESTS, TORCH = str(Path(__file__).resolve().parent), str(Path(torch.__file__).parent)  # as frames name them
MAKERS = _device_constructors() | {torch.from_numpy}
ADOPTS = {torch.as_tensor, torch.asarray}  # given a tensor they move it, or leave it where it is
WHERE = Tensor.device.__get__
READS_VALUES = {Tensor.numpy, Tensor.__array__}
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
TAKES_NUMBERS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _storage(tensor):
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def is_on(tensor):
    """The device of a tensor, None for a temporary of torch's own."""
    return getattr(_storage(tensor), "second_device", None)


def put(tensor, device):
    """Mark a tensor that nobody else holds."""
    _storage(tensor).second_device = device
    return tensor


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):  # nothing is compiled here; saying so costs seconds of imports
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = [*_tensors(args), *_tensors(kwargs.values())]
        places = [is_on(a) for a in operands]
        if DEVICE in places and CPU in places and function not in COPIES:
            self._check(function, args, operands, places)
        result = function(*args, **kwargs)
        here = DEVICE if DEVICE in places else CPU if CPU in places else None
        if here is not None:
            for a in _tensors((result,)):
                if is_on(a) is None:
                    put(a, here)
        return result

    def _check(self, function, args, operands, places):
        """Raise unless all that is on the CPU may be: numbers, and indices."""
        numbers = torch.Tag.pointwise in function.tags or function in TAKES_NUMBERS
        indices = {id(a) for a in _tensors(args[1])} if function in INDEXES else ()
        for a, place in zip(operands, places):
            if place == CPU and not (id(a) in indices or (numbers and a.ndim == 0 and a is not operands[0])):
                raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found two")


class _Move(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, device):
        return put(aten._to_copy.default(tensor), device)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.origin = is_on(inputs[0]) or CPU

    @staticmethod
    def backward(ctx, gradient):
        return _Move.apply(gradient, ctx.origin), None


class _Python(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == WHERE:
            return DEVICE if is_on(args[0]) == DEVICE else function(*args, **kwargs)
        if function in READS_VALUES and is_on(args[0]) == DEVICE:
            raise TypeError("can't convert a tensor of the second device to numpy: copy it to the CPU first")
        if function in (Tensor.to, Tensor.cpu) or (function in ADOPTS and isinstance(args[0], Tensor)):
            return self._to(function, args, kwargs)
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), CPU
            return put(function(*args, **kwargs), device)
        if function in MAKERS:
            return put(function(*args, **kwargs), DEVICE if _asked_by_a_test() else CPU)
        return function(*args, **kwargs)

    def _to(self, function, args, kwargs):
        tensor, *options = args
        device = CPU if function is Tensor.cpu else kwargs.pop("device", None)
        for i, option in enumerate(options):
            if isinstance(option, Tensor):
                device, options[i] = is_on(option) or CPU, option.dtype
            elif isinstance(option, str | torch.device):
                device, options[i] = option, None
        if "other" in kwargs:
            other = kwargs.pop("other")
            device, kwargs["dtype"] = is_on(other) or CPU, other.dtype
        options = [option for option in options if option is not None and not isinstance(option, bool)]  # non_blocking
        moved = tensor.to(*options, **kwargs) if options or kwargs else tensor
        if device is None or torch.device(device) == (is_on(tensor) or CPU):
            return moved
        return _Move.apply(moved, torch.device(device))


def _caller():
    frame = sys._getframe(3)
    while frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename


def _asked_by_a_test():
    return _caller().startswith(TESTS)


@contextmanager
def second_device():
    """Within it, tests live on the second device."""
    with _Operations(), _Python():
        yield
