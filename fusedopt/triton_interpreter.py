"""Repair of Triton's interpreter, in which the kernels run on CPU tensors (``TRITON_INTERPRET=1``).

As shipped (3.6 to 3.9), it truncates float32 -> bfloat16 instead of rounding to the nearest, and takes
bfloat16 subnormals for garbage. Triton 3.6 moreover cannot use a tensor as a bound of ``range`` with numpy 2.4.
And whenever one jit function calls another it looks through all of triton.language for what it has to replace, and
replaces it once more: two thirds of a kernel's time. Of what is left nearly half goes into making the same types
anew, asking equal ones whether they are, and sums of integers in int64 whose overflow nobody looks at.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """float32 values to the bits of bfloat16, or back: torch's conversion rounds as GPUs do."""
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    if target == tl.bfloat16:
        bits = tensor.to(torch.bfloat16).view(torch.uint16)
    else:
        bits = tensor.view(torch.bfloat16).to(torch.float32)
    # ascontiguousarray makes scalars 1-dimensional.
    return bits.numpy().reshape(data.shape)


def repaired(cast: Callable) -> Callable:
    """``cast(builder, source, type, ...)``, except between float32 and bfloat16."""

    def wrapper(self: Any, source: Any, target_type: Any, *args: Any) -> Any:
        kinds = source.dtype.scalar, target_type.scalar
        if kinds in ((tl.float32, tl.bfloat16), (tl.bfloat16, tl.float32)):
            return interpreter.TensorHandle(convert(source.data, *kinds), kinds[1])
        return cast(self, source, target_type, *args)

    return wrapper


def index(tensor: Any) -> int:
    """A kernel's scalar as a Python int; the interpreter holds it as an array of one element."""
    return int(tensor.handle.data.item())


@functools.cache
def builtins(package: Any) -> list[tuple[str, Any]]:
    """What the interpreter replaces in a module or class. Asked first while nothing is replaced."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name, member in builtins(package):
        scope.set_attr(package, name, interpreted(member))


@functools.cache
def interpreted(member: Callable) -> Callable:
    """A function of Triton's language, whose operations the interpreter carries out."""
    # What builtin() wraps a function in only looks whether there is a _semantic.
    function = inspect.unwrap(member)
    semantic = interpreter.interpreter_semantic

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return wrapper


@functools.cache
def languages(function: Callable) -> frozenset:
    """The modules that a function sees and the interpreter replaces."""
    seen = filter(inspect.ismodule, function.__globals__.values())
    return frozenset(module for module in seen if module in (tl, tl.core))


def once(patch: Callable) -> Callable:
    """``patch(function)``, which replaces the language that a function sees until the scope that it returns is
    restored; nothing where it is replaced already."""
    replaced: set = set()

    def wrapper(function: Callable) -> Any:
        seen = languages(function)
        new = seen - replaced
        if seen and not new:
            return interpreter._LangPatchScope()
        scope = patch(function)
        replaced.update(new)
        restore = scope.restore

        def restore_and_note() -> None:
            restore()
            replaced.difference_update(new)

        scope.restore = restore_and_note
        return scope

    return wrapper


def of_scalars(find: Callable) -> Callable:
    """``find(type)``, numpy's dtype, which depends on the scalar alone; a table of all of them is made to find it."""
    known: dict[str, np.dtype] = {}

    def wrapper(kind: tl.dtype) -> np.dtype:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return wrapper


def shared(make: Callable) -> Callable:
    """``make(block, scalar)``, the type of a block as large as the other: one object for all that are alike, since
    nobody writes to types."""
    known: dict[tuple, tl.block_type] = {}

    def wrapper(self: tl.block_type, scalar: tl.dtype) -> tl.block_type:
        key = tuple(self.shape), scalar.name, getattr(scalar, "address_space", None)
        if key not in known:
            known[key] = make(self, scalar)
        return known[key]

    return wrapper


def alike(init: Callable) -> Callable:
    """``init(tensor, handle, type)``: whatever else a tensor has is the same for all of a type, and made once."""

    def wrapper(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        common = vars(type).get("common")
        if common is None:
            init(self, handle, type)
            type.common = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(common)
            self.handle = handle

    return wrapper


def or_identical(equal: Callable) -> Callable:
    """``equal(type, other)``, which compares names."""
    return lambda self, other: self is other or equal(self, other)


def but_plain(unwrap: Callable) -> Callable:
    """``unwrap(value)``, which looks for constants in tuples and lists."""
    plain = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, type(None)}
    return lambda value: value if type(value) in plain else unwrap(value)


def but_one_shape(broadcast: Callable) -> Callable:
    """``broadcast(semantic, x, y)``: both of one shape, which blocks hardly ever lack."""

    def wrapper(self: Any, x: Any, y: Any) -> tuple[Any, Any]:
        if x.type.is_block() and y.type.is_block() and [*x.type.shape] == [*y.type.shape]:
            return x, y
        return broadcast(self, x, y)

    return wrapper


@functools.cache
def repair() -> None:
    """Patch the interpreter of this process."""
    for package in (tl, tl.math, tl.tensor, tl.core, tl.core.tensor_descriptor_base):
        builtins(package)
    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = once(interpreter._patch_lang)
    interpreter._get_np_dtype = of_scalars(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = shared(tl.block_type.with_element_ty)
    tl.block_type.to_ir = lambda self, builder: self
    tl.tensor.__init__ = alike(tl.tensor.__init__)
    tl.dtype.__eq__ = or_identical(tl.dtype.__eq__)
    tl.core._unwrap_if_constexpr = but_plain(tl.core._unwrap_if_constexpr)

    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = but_one_shape(semantic.broadcast_impl_value)

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    builder = interpreter.InterpreterBuilder
    # fp_ext, fp_trunc and the other casts look cast_impl up when they are called.
    builder.cast_impl = repaired(builder.cast_impl)
    builder.create_fp_to_fp = repaired(builder.create_fp_to_fp)

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = patch_and_mend
