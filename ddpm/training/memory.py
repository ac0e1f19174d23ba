"""The memory that a training step takes, estimated before it is compiled, and that there is."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend import core

from ddpm.files.machine import Memory, machine_memory

# Results of these are arrays in memory; of all others, which are elementwise, only if several
# operations read them.
_UNFUSED = {
    "argmax", "concatenate", "cond", "conv_general_dilated", "cumsum", "custom_call",
    "dot_general", "dynamic_update_slice", "ffi_call", "gather", "optimization_barrier", "pad",
    "random_bits", "reduce_max", "reduce_min", "reduce_sum", "reduce_window", "scan", "scatter",
    "scatter-add", "scatter_add", "sort", "threefry2x32", "transpose", "while",
}  # fmt: skip
# Results of these are never: views, and what is cheap to repeat in every reader.
_VIEWS = {"bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "copy",
          "expand_dims", "iota", "reshape", "squeeze"}  # fmt: skip
_CALLS = {"checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
          "custom_vjp_call_jaxpr", "jit", "pjit", "remat"}  # fmt: skip
_XLA = 1.05  # its count over ours, see `temporaries`


@dataclass(eq=False, slots=True)
class _Array:
    """A result: its size, who reads it (numbers of operations), whether it takes memory, and the
    last operation that needs it there."""

    bytes: int
    readers: set[int] = field(default_factory=set)
    in_memory: bool = False
    last: int = 0


class _Operation(NamedTuple):
    """An operation; `inner` is the peak in bytes of a loop's body."""

    name: str
    reads: list[_Array]
    results: list[_Array]
    inner: int


def temporaries(jaxpr: core.Jaxpr) -> int:
    """Estimates the memory of a program's intermediate results, bytes: the most that are alive at
    once, in the program's order, without those that XLA fuses into their readers.

    Measured against XLA's count (`memory_analysis`; CPU, jax 0.10.2), in MB, for a training step of
    configs/digits.py: 39.7 for 39.5; fashion_mnist.py: 228 for 224; folder_small.py: 152 for 169;
    folder.py: 25,250 for 25,320; cifar10.py with a batch of 8: 1,075 for 1,059; a transformer: 158
    for 180; bfloat16 on a CPU, which computes it in float32, only 69 for 165. It takes a tenth of
    the time of tracing. Not measured on accelerators, where XLA fuses more.
    """
    return int(_XLA * _peak(jaxpr))


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def memory(device: Any) -> Memory | None:
    """Returns the memory of a device; for a CPU its share of the machine's, swap included, or of
    the control group's; None where the system does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return Memory(stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if device.platform != "cpu":
        return None
    there, devices = machine_memory(), jax.local_device_count()
    return there and Memory(there.total // devices, there.free // devices)


def _peak(jaxpr: core.Jaxpr) -> int:
    operations: list[_Operation] = []
    outputs = _inline(jaxpr, {}, operations)
    _set_lifetimes(operations, outputs)
    dying: list[int] = [0] * (len(operations) + 1)  # bytes that each operation is the last to need
    now = most = 0
    for i, operation in enumerate(operations):
        for array in operation.results:
            if array.in_memory:
                now += array.bytes
                dying[array.last] += array.bytes
        most = max(most, now + operation.inner)
        now -= dying[i]
    return most


def _inline(
    jaxpr: core.Jaxpr, arrays: dict[Any, _Array], found: list[_Operation]
) -> list[_Array | None]:
    """Adds the operations to `found`, those of calls in their place; returns the outputs.

    `arrays` are those of the variables so far: inputs of the program, and constants, have none.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        reads = [arrays.get(v) if isinstance(v, core.Var) else None for v in equation.invars]
        outputs: list[Any]
        parts = list(_parts(equation))
        if name in _CALLS and parts:
            parameters = parts[0].invars
            given = dict(zip(parameters, reads[len(reads) - len(parameters) :], strict=True))
            inside = {v: array for v, array in given.items() if array is not None}
            outputs = _inline(parts[0], inside, found)
        else:
            outputs = [_Array(_bytes(v.aval)) for v in equation.outvars]
            inner = max(map(_peak, parts), default=0)
            found.append(_Operation(name, [x for x in reads if x is not None], outputs, inner))
        for variable, array in zip(equation.outvars, outputs, strict=True):
            if array is not None:
                arrays[variable] = array
    return [arrays.get(v) if isinstance(v, core.Var) else None for v in jaxpr.outvars]


def _set_lifetimes(operations: list[_Operation], outputs: list[_Array | None]) -> None:
    """Sets which results take memory, and until when. What an operation reads that is fused into
    its reader is needed as long as that reader needs it."""
    for i, operation in enumerate(operations):
        for array in operation.reads:
            array.readers.add(i)
    end = len(operations)
    for output in outputs:
        if output is not None:
            output.readers.add(end)
            output.last = end
    for i in range(end - 1, -1, -1):
        operation, until = operations[i], i
        fusible = operation.name not in _UNFUSED
        for array in operation.results:
            inside = bool(array.readers) and end not in array.readers
            fused = operation.name in _VIEWS or (fusible and inside and len(array.readers) == 1)
            array.in_memory = inside and not fused
            if fused:
                until = max(until, array.last)
        for array in operation.reads:
            array.last = max(array.last, until)


def _parts(equation: Any) -> Iterator[core.Jaxpr]:
    """Yields the programs inside an operation: a call's, a loop's body, a condition's branches."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _bytes(x: Any) -> int:
    """Returns the bytes of an array, or of a shape with a dtype; 0 for anything else."""
    dtype = getattr(x, "dtype", None)
    return math.prod(x.shape) * getattr(dtype, "itemsize", 4) if hasattr(x, "shape") else 0
