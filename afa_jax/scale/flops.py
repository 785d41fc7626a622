"""Floating-point operations of a compiled program: its matrix products and convolutions, counted through its loops.

``compiled.cost_analysis()`` counts the body of a loop once: a sampler of 50 steps would cost as much as one step, three
experts in a loop as much as one. Elementwise operations are left out: a chip's peak is that of its matrix units.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from afa_jax.scale.hlo import Computation, Executed, Instruction, parse

_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Matrix products in each of the splash attention kernels, the only kernels used here. Forward: logits and output. For
the queries' gradient: logits, their gradient, the result. For the keys' and values' gradient: logits, their gradient,
the two results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """The operations of one device in a run of the program.

    Attributes:
        products: operations in matrix products and convolutions; a multiplication and an addition count as two.
        exact: False if a loop's length is unknown (it counts as one iteration), or some are in a branch.
        unknown: kernels whose operations are unknown and therefore not in ``products``.
    """

    products: int
    exact: bool
    unknown: tuple[str, ...]


def flops(text: str) -> Flops:
    """Count the operations of ``compiled.as_text()``."""
    total, exact, unknown = 0, True, []
    for executed in parse(text).executed():
        count = _operations(executed)
        if count is None:
            unknown.append(executed.instruction.name)
        elif count:
            exact = exact and executed.times is not None and not executed.conditional
            total += count * (1 if executed.times is None else executed.times)
    return Flops(products=total, exact=exact, unknown=tuple(unknown))


def _operations(executed: Executed) -> int | None:
    """Return the operations of one execution; None for an unknown kernel."""
    instruction, computation = executed.instruction, executed.computation
    if instruction.opcode == "dot":
        return _dot(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
        products = next((n for name, n in _PRODUCTS.items() if instruction.name.startswith(name)), None)
        # Queries, keys and values come first, as [heads, length, width] of one row or [row, heads, length, width].
        wide = [sizes for sizes in _operand_sizes(instruction, computation, "f") if len(sizes) > 2]
        if products is None or len(wide) < 2:
            return None
        (*rows_and_heads, queries, width), keys = wide[0], wide[1][-2]
        return 2 * products * math.prod(rows_and_heads) * queries * keys * width
    return 0


def _operand_sizes(instruction: Instruction, computation: Computation, kind: str = "") -> list[tuple[int, ...]]:
    """Return the shapes of the operands whose dtype contains ``kind``: "f" is in all floating-point dtypes."""
    arrays = (array for name in instruction.operands for array in computation.instructions[name].arrays)
    return [sizes for dtype, sizes in arrays if kind in dtype]


def _dot(instruction: Instruction, computation: Computation) -> int:
    left = _operand_sizes(instruction, computation)[0]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [left[int(n)] for n in found[1].split(",")] if found and found[1] else []
    return 2 * math.prod(instruction.arrays[0][1]) * math.prod(contracted)


def _convolution(instruction: Instruction, computation: Computation) -> int:
    """Count operations as XLA does: at each output position, the kernel positions that meet an input element.

    That leaves out padding and the zeros between dilated elements. Gradients of convolutions use such zeros, and so do
    batched products on a TPU.
    """
    image, kernel = _operand_sizes(instruction, computation)[:2]
    result = instruction.arrays[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    pairs = 1
    for n in range(sum(label.isdigit() for label in labels[1])):
        before = int(fields["pad"].split("x")[n].split("_")[0]) if "pad" in fields else 0
        stride, spread, dilation = (
            int(fields[name].split("x")[n]) if name in fields else 1 for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        size, length, out = (
            sizes[own.index(str(n))] for sizes, own in ((kernel, labels[2]), (image, labels[1]), (result, labels[3]))
        )
        met = np.arange(out)[:, None] * stride + np.arange(size)[None] * dilation - before
        pairs *= int(np.sum((met >= 0) & (met <= (length - 1) * spread) & (met % spread == 0)))
    batch = image[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2 * pairs * batch * kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
