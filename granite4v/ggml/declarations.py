"""ctypes declarations of the C functions that this package calls, in header order. No logic.

Source: ggml 0.25.3, include/ggml.h, ggml-alloc.h, ggml-backend.h, ggml-cpu.h, as built into
llama-cpp-python 0.3.36. Each kind of handle has its own Python type, so that one cannot be passed for another.
"""

from __future__ import annotations

import ctypes as c
from typing import Any, NamedTuple

MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_OP_PARAMS = 64  # GGML_MAX_OP_PARAMS, bytes
MAX_SRC = 10  # GGML_MAX_SRC
MAX_NAME = 64  # GGML_MAX_NAME
ALL_THREADS = -1  # GGML_N_TASKS_MAX


class Handle(c.c_void_p):
    """A pointer type whose results ctypes returns as objects of that type (a bare c_void_p result becomes an int)."""


class ContextP(Handle):
    """struct ggml_context *"""


class GraphP(Handle):
    """struct ggml_cgraph *"""


class BackendP(Handle):
    """ggml_backend_t"""


class BufferP(Handle):
    """ggml_backend_buffer_t"""


class BufferTypeP(Handle):
    """ggml_backend_buffer_type_t"""


class DeviceP(Handle):
    """ggml_backend_dev_t"""


class RegistryP(Handle):
    """ggml_backend_reg_t"""


class AllocatorP(Handle):
    """ggml_gallocr_t"""


class TensorStruct(c.Structure):
    """struct ggml_tensor; `library.lib` checks its size against the library before it is used."""


TensorP = c.POINTER(TensorStruct)

TensorStruct._fields_ = [
    ("type", c.c_int),
    ("buffer", BufferP),
    ("ne", c.c_int64 * MAX_DIMS),
    ("nb", c.c_size_t * MAX_DIMS),
    ("op", c.c_int),
    ("op_params", c.c_int32 * (MAX_OP_PARAMS // 4)),
    ("flags", c.c_int32),
    ("src", TensorP * MAX_SRC),
    ("view_src", TensorP),
    ("view_offs", c.c_size_t),
    ("data", c.c_void_p),
    ("name", c.c_char * MAX_NAME),
    ("extra", c.c_void_p),
    ("padding", c.c_char * 8),
]


class InitParams(c.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool)]


class Feature(c.Structure):
    """struct ggml_backend_feature. An entry without a name ends an array of these."""

    _fields_ = [("name", c.c_char_p), ("value", c.c_char_p)]


class Declaration(NamedTuple):
    library: str  # the library that defines it: 'ggml-base', 'ggml-cpu' or 'ggml'
    name: str
    restype: Any
    argtypes: tuple[Any, ...]


def _base(name: str, restype: Any, *argtypes: Any) -> Declaration:
    return Declaration("ggml-base", name, restype, argtypes)


def _registry(name: str, restype: Any, *argtypes: Any) -> Declaration:
    return Declaration("ggml", name, restype, argtypes)


_size, _i64, _int, _float, _str, _void_p = c.c_size_t, c.c_int64, c.c_int, c.c_float, c.c_char_p, c.c_void_p

DECLARATIONS: tuple[Declaration, ...] = (
    # ggml.h
    _base("ggml_version", _str),
    _base("ggml_nbytes", _size, TensorP),
    _base("ggml_blck_size", _i64, _int),  # (enum ggml_type)
    _base("ggml_type_size", _size, _int),
    _base("ggml_row_size", _size, _int, _i64),  # (enum ggml_type, int64_t ne)
    _base("ggml_type_name", _str, _int),
    _base("ggml_op_name", _str, _int),
    _base("ggml_tensor_overhead", _size),
    _base("ggml_init", ContextP, InitParams),
    _base("ggml_free", None, ContextP),
    _base("ggml_new_tensor_4d", TensorP, ContextP, _int, _i64, _i64, _i64, _i64),
    _base("ggml_set_name", TensorP, TensorP, _str),
    _base("ggml_set_input", None, TensorP),
    _base("ggml_set_output", None, TensorP),
    _base("ggml_add", TensorP, ContextP, TensorP, TensorP),
    _base("ggml_add_inplace", TensorP, ContextP, TensorP, TensorP),
    _base("ggml_mul", TensorP, ContextP, TensorP, TensorP),
    _base("ggml_mul_inplace", TensorP, ContextP, TensorP, TensorP),
    _base("ggml_div_inplace", TensorP, ContextP, TensorP, TensorP),
    _base("ggml_sqr", TensorP, ContextP, TensorP),
    _base("ggml_repeat_4d", TensorP, ContextP, TensorP, _i64, _i64, _i64, _i64),
    _base("ggml_concat", TensorP, ContextP, TensorP, TensorP, _int),  # (ctx, a, b, dim)
    _base("ggml_cpy", TensorP, ContextP, TensorP, TensorP),  # (ctx, a, b): a into b
    _base("ggml_pad", TensorP, ContextP, TensorP, _int, _int, _int, _int),
    _base("ggml_gelu_erf_inplace", TensorP, ContextP, TensorP),
    _base("ggml_silu_inplace", TensorP, ContextP, TensorP),
    _base("ggml_norm", TensorP, ContextP, TensorP, _float),  # (ctx, a, eps)
    _base("ggml_rms_norm", TensorP, ContextP, TensorP, _float),  # (ctx, a, eps)
    _base("ggml_swiglu_split", TensorP, ContextP, TensorP, TensorP),  # (ctx, a, b): silu(a) * b
    _base("ggml_mul_mat", TensorP, ContextP, TensorP, TensorP),
    # (ctx, a, mask, scale, max_bias)
    _base("ggml_soft_max_ext_inplace", TensorP, ContextP, TensorP, TensorP, _float, _float),
    # (ctx, a, positions, factors, n_dims, mode, n_ctx_orig, base, scale, ext_factor, attn_factor, beta_fast, beta_slow)
    _base(
        "ggml_rope_ext_inplace",
        TensorP,
        ContextP,
        TensorP,
        TensorP,
        TensorP,
        _int,
        _int,
        _int,
        _float,
        _float,
        _float,
        _float,
        _float,
        _float,
    ),
    _base("ggml_scale", TensorP, ContextP, TensorP, _float),
    _base("ggml_scale_inplace", TensorP, ContextP, TensorP, _float),
    _base("ggml_scale_bias_inplace", TensorP, ContextP, TensorP, _float, _float),  # (ctx, a, s, b)
    _base("ggml_cast", TensorP, ContextP, TensorP, _int),
    _base("ggml_cont", TensorP, ContextP, TensorP),
    _base("ggml_reshape_4d", TensorP, ContextP, TensorP, _i64, _i64, _i64, _i64),
    # (ctx, a, ne0, ne1, ne2, ne3, nb1, nb2, nb3, offset)
    _base("ggml_view_4d", TensorP, ContextP, TensorP, _i64, _i64, _i64, _i64, _size, _size, _size, _size),
    _base("ggml_permute", TensorP, ContextP, TensorP, _int, _int, _int, _int),
    _base("ggml_get_rows", TensorP, ContextP, TensorP, TensorP),
    # (ctx, q, k, v, mask, scale, max_bias, logit_softcap)
    _base("ggml_flash_attn_ext", TensorP, ContextP, TensorP, TensorP, TensorP, TensorP, _float, _float, _float),
    # (ctx, type, ne0, ne1, ne2, ne3, args, n_args, fun, n_tasks, userdata)
    _base(
        "ggml_custom_4d",
        TensorP,
        ContextP,
        _int,
        _i64,
        _i64,
        _i64,
        _i64,
        c.POINTER(TensorP),
        _int,
        _void_p,
        _int,
        _void_p,
    ),
    _base("ggml_build_forward_expand", None, GraphP, TensorP),
    _base("ggml_new_graph_custom", GraphP, ContextP, _size, c.c_bool),  # (ctx, size, grads)
    _base("ggml_graph_node", TensorP, GraphP, _int),
    _base("ggml_graph_n_nodes", _int, GraphP),
    _base("ggml_graph_add_node", None, GraphP, TensorP),
    _base("ggml_graph_overhead_custom", _size, _size, c.c_bool),
    _base("ggml_quantize_init", None, _int),
    # (type, src, dst, start, nrows, n_per_row, imatrix)
    _base("ggml_quantize_chunk", _size, _int, _void_p, _void_p, _i64, _i64, _i64, _void_p),
    # ggml-alloc.h
    _base("ggml_gallocr_new", AllocatorP, BufferTypeP),
    _base("ggml_gallocr_free", None, AllocatorP),
    _base("ggml_gallocr_alloc_graph", c.c_bool, AllocatorP, GraphP),
    _base("ggml_gallocr_get_buffer_size", _size, AllocatorP, _int),
    _base("ggml_backend_alloc_ctx_tensors_from_buft", BufferP, ContextP, BufferTypeP),
    # ggml-backend.h
    _base("ggml_backend_buft_name", _str, BufferTypeP),
    _base("ggml_backend_buft_alloc_buffer", BufferP, BufferTypeP, _size),
    _base("ggml_backend_buft_get_device", DeviceP, BufferTypeP),
    _base("ggml_backend_buffer_free", None, BufferP),
    _base("ggml_backend_buffer_get_base", _void_p, BufferP),
    _base("ggml_backend_buffer_get_size", _size, BufferP),
    _base("ggml_backend_buffer_is_host", c.c_bool, BufferP),
    _base("ggml_backend_buffer_get_type", BufferTypeP, BufferP),
    _base("ggml_backend_buffer_set_usage", None, BufferP, _int),
    _base("ggml_backend_free", None, BackendP),
    _base("ggml_backend_tensor_set", None, TensorP, _void_p, _size, _size),  # (tensor, data, offset, size)
    _base("ggml_backend_tensor_get", None, TensorP, _void_p, _size, _size),
    _base("ggml_backend_tensor_alloc", _int, BufferP, TensorP, _void_p),  # (buffer, tensor, addr)
    _base("ggml_backend_graph_compute", _int, BackendP, GraphP),
    _base("ggml_backend_dev_name", _str, DeviceP),
    _base("ggml_backend_dev_description", _str, DeviceP),
    _base("ggml_backend_dev_type", _int, DeviceP),
    _base("ggml_backend_dev_backend_reg", RegistryP, DeviceP),
    _base("ggml_backend_dev_init", BackendP, DeviceP, _str),
    _base("ggml_backend_dev_buffer_type", BufferTypeP, DeviceP),
    # (device, ptr, size, max_tensor_size)
    _base("ggml_backend_dev_buffer_from_host_ptr", BufferP, DeviceP, _void_p, _size, _size),
    _base("ggml_backend_dev_supports_op", c.c_bool, DeviceP, TensorP),
    _base("ggml_backend_reg_name", _str, RegistryP),
    _base("ggml_backend_reg_get_proc_address", _void_p, RegistryP, _str),
    _registry("ggml_backend_dev_count", _size),
    _registry("ggml_backend_dev_get", DeviceP, _size),
)
