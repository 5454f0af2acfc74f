"""Memory that torch did not allocate as a tensor, by a DLPack capsule that is made here (github.com/dmlc/dlpack, v0.8).

The device is given, not asked of the pointer, and nothing is copied. The capsule has no deleter: the memory is never
given back by torch, so its owner keeps the mapping while a tensor over it may be used.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
"""kDLCPU, kDLCUDA."""
_UNSIGNED_INT = 1


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_dimensions", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", _Tensor), ("manager_context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_exported: list[Any] = []
"""What capsules point to, for the life of the process: a few objects, one for each mapped segment."""


def bytes_tensor(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """Returns the ``num_bytes`` at ``address`` of ``device``, a CPU or a GPU, as a uint8 tensor."""
    shape = (ctypes.c_int64 * 1)(num_bytes)
    location = _Device(_DEVICE_TYPES[device.type], device.index or 0)
    managed = _ManagedTensor(_Tensor(address, location, 1, _DataType(_UNSIGNED_INT, 8, 1), shape, None, 0), None, None)
    _exported.append((managed, shape))
    tensor: Tensor = from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))
    return tensor
