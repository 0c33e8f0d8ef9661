"""The two inner loops of bicubic.py, in LLVM's vectors.

Written in Python, Numba would keep the sums of the one in memory and move the bytes of the other
one by one: twice the time. Nothing here is for one kind of processor. Addresses are those of uint8,
as `array.ctypes.data` gives them, and steps are in bytes.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # bytes that are weighed at a time: their sums are in registers
SQUARE = 16  # rows and columns that are transposed at a time
BITS = 22  # of a weight's fraction: Pillow's PRECISION_BITS

INT8, INT32 = ir.IntType(8), ir.IntType(32)
BYTES, SUMS = ir.VectorType(INT8, LANES), ir.VectorType(INT32, LANES)
LINE = ir.VectorType(INT8, SQUARE)


@intrinsic
def weigh(typingctx, rows, step, weights, count, out):
    """LANES bytes at `out`: the sum of `count` rows at `rows`, each times its int32 of `weights`,
    rounded, and cut off at 0 and 255."""

    def generate(context, builder, signature, arguments):
        rows, step, weights, count, out = arguments
        # A half, so that cutting off the fraction rounds.
        total = cgutils.alloca_once_value(builder, every(1 << (BITS - 1)))
        with cgutils.for_range(builder, count) as loop:
            row = builder.load(pointer(builder, rows, step, loop.index, BYTES), align=1)
            size = ir.Constant(step.type, 4)
            weight = builder.load(pointer(builder, weights, size, loop.index, INT32))
            lanes = builder.insert_element(every(None), weight, INT32(0))
            lanes = builder.shuffle_vector(lanes, every(None), every(0))
            product = builder.mul(builder.zext(row, SUMS), lanes)
            builder.store(builder.add(builder.load(total), product), total)
        value = builder.ashr(builder.load(total), every(BITS))
        value = builder.select(builder.icmp_signed("<", value, every(0)), every(0), value)
        value = builder.select(builder.icmp_signed(">", value, every(255)), every(255), value)
        target = builder.inttoptr(out, BYTES.as_pointer())
        builder.store(builder.trunc(value, BYTES), target, align=1)
        return context.get_dummy_value()

    address, number = types.uintp, types.intp
    return types.void(address, number, address, number, address), generate


@intrinsic
def transpose_square(typingctx, rows, step, out, out_step):
    """SQUARE x SQUARE bytes: out[j, i] = rows[i, j]."""

    def generate(context, builder, signature, arguments):
        rows, step, out, out_step = arguments
        at = [ir.Constant(step.type, i) for i in range(SQUARE)]
        lines = [builder.load(pointer(builder, rows, step, i, LINE), align=1) for i in at]
        # Of a and b: a0 b0 a1 b1 … With lines i and i + 8, four times, it is the transpose.
        order = [n // 2 + n % 2 * SQUARE for n in range(2 * SQUARE)]
        halves = [ir.Constant(ir.VectorType(INT32, SQUARE), half) for half in halved(order)]
        for _ in range(4):
            pairs = zip(*halved(lines), strict=True)
            lines = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in halves]
        for i, line in zip(at, lines, strict=True):
            builder.store(line, pointer(builder, out, out_step, i, LINE), align=1)
        return context.get_dummy_value()

    address, number = types.uintp, types.intp
    return types.void(address, number, address, number), generate


def pointer(builder, start, step, index, kind):
    """Of the value of that kind, `index` steps after the start."""
    return builder.inttoptr(builder.add(start, builder.mul(step, index)), kind.as_pointer())


def every(number):
    """A vector of the same number; of none in particular, for None."""
    return ir.Constant(SUMS, ir.Undefined if number is None else [number] * LANES)


def halved(items):
    return items[: len(items) // 2], items[len(items) // 2 :]
