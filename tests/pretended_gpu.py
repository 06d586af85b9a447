"""
A GPU that is none: tensors that say they are on "cuda" and hold their values on the CPU.

What a real one would refuse is refused (operations on tensors of both devices), and what makes the host wait for it is
counted: values read back, copies to the CPU, results whose shape depends on values. Without gradients of views.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda")
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.masked_select.default}
CROSS = {aten._to_copy.default, aten.copy_.default}  # between devices


class Pretended(torch.Tensor):
    @staticmethod
    def __new__(cls, value):
        # As fake tensors do: without memory for PyTorch, which asks `run` for the device
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=CUDA)

    def __init__(self, value):
        self.value = value.detach()

    def tolist(self):  # which PyTorch refuses to subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs, waits=None):
    if func is torch.ops.prim.device.default:
        return CUDA if isinstance(args[0], Pretended) else args[0].device
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretended)]
    if ours and func not in CROSS and any(other.dim() for other in others):
        raise RuntimeError(f"{func}: expected all tensors on one device, got cuda and cpu")
    device = kwargs.get("device")
    on_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], Pretended)
    if waits is not None and ours and (func in WAITS or (func in CROSS and not on_gpu)):
        waits.append(str(func))
    if func is aten._fused_sdp_choice.default:
        return 0  # the plain way, in operations that a CPU has
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    wrappers = {id(leaf.value): leaf for leaf in ours}
    args, kwargs = tree_map(lambda leaf: leaf.value if isinstance(leaf, Pretended) else leaf, (args, kwargs))

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor) or not on_gpu:
            return leaf
        return wrappers[id(leaf)] if id(leaf) in wrappers else Pretended(leaf)  # in place: what it was stays

    with torch.inference_mode(False), torch.no_grad():  # what is made in it could not be wrapped
        return tree_map(wrap, func(*args, **kwargs))


class PretendedGPU(TorchDispatchMode):
    """While in use, operations run on the CPU, whatever device they name. waits: those that a GPU would wait in."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.prim.device.default:
            with self:  # inference mode hands over operations that consist of others
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return run(func, args, kwargs or {}, self.waits)


def moved(module):
    """The module with parameters and buffers on the pretended GPU."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(Pretended(p.detach()), p.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = Pretended(buffer)
    return module


@contextlib.contextmanager
def pretended_gpu():
    """In it, PyTorch takes the GPU for real, one with bf16. Gives the PretendedGPU."""
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": False,
            "torch.cuda.is_bf16_supported": True,
            "torch.cuda._lazy_init": None,
            "torch.cuda.Event": mock.MagicMock(),  # of a stopwatch
        }.items():
            stack.enter_context(mock.patch(name, return_value=value))
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") then comes by here
        yield stack.enter_context(PretendedGPU())
