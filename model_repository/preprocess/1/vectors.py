"""The loops of bicubic.py with LLVM's vectors, compiled for this processor when the model loads.

Each takes addresses, as in `array.ctypes.data`, and sizes in elements, all int64. ctypes releases
the GIL while one runs. Nothing here depends on the kind of processor.
"""

import contextlib
import ctypes
import types

import llvmlite.binding as llvm
from llvmlite import ir

LANES = 32  # bytes weighted at a time: their sums fit into registers
SQUARE = 16  # rows and columns transposed at a time
STRIP = 64  # rows of a transposed strip: one cache line per column
BITS = 22  # fraction bits of a weight: Pillow's PRECISION_BITS

INT8, INT32, INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
BYTES, SUMS = ir.VectorType(INT8, LANES), ir.VectorType(INT32, LANES)
LINE = ir.VectorType(INT8, SQUARE)


def weigh_rows(b, rows, first, count, weights, taps, out, new, n):
    """Set row i of `out` [new, n] to the sum of count[i] rows of `rows` [?, n] from first[i] on,
    each times its weight in `weights` int32 [new, taps], rounded, and clamped to 0..255.

    n >= LANES.
    """
    with each(b, new) as row, each(b, n, LANES) as lane:
        x = smaller(b, lane, b.sub(n, INT64(LANES)))  # the last lanes overlap
        source, many = (load(b, INT64, array, (row, 8)) for array in (first, count))

        def weighed(tap):
            pixels = load(b, BYTES, rows, (source, n), (tap, n), (x, 1))
            weight = load(b, INT32, weights, (b.mul(row, taps), 4), (tap, 4))
            lanes = b.insert_element(every(None), weight, INT32(0))
            return b.mul(b.zext(pixels, SUMS), b.shuffle_vector(lanes, every(None), every(0)))

        # Starts at a half, so that truncating the fraction rounds.
        value = b.ashr(summed(b, every(1 << (BITS - 1)), many, weighed), every(BITS))
        value = b.select(b.icmp_signed("<", value, every(0)), every(0), value)
        value = b.select(b.icmp_signed(">", value, every(255)), every(255), value)
        store(b, b.trunc(value, BYTES), out, (row, n), (x, 1))


def transpose(b, rows, step, out, out_step, h, n):
    """Set out[j, i] = rows[i, j] for h rows and n columns, both >= SQUARE."""
    numbers = [INT64(k) for k in range(SQUARE)]
    # Interleaves a and b: a0 b0 a1 b1 … Four times, with lines k and k + 8, this transposes.
    order = [k // 2 + k % 2 * SQUARE for k in range(2 * SQUARE)]
    halves = [ir.Constant(ir.VectorType(INT32, SQUARE), half) for half in halved(order)]
    with each(b, h, SQUARE) as line, each(b, n, SQUARE) as column:
        i = smaller(b, line, b.sub(h, INT64(SQUARE)))  # the last squares overlap
        j = smaller(b, column, b.sub(n, INT64(SQUARE)))
        lines = [load(b, LINE, rows, (i, step), (k, step), (j, 1)) for k in numbers]
        for _ in range(4):
            pairs = zip(*halved(lines), strict=True)
            lines = [b.shuffle_vector(one, other, half) for one, other in pairs for half in halves]
        for k, turned in zip(numbers, lines, strict=True):
            store(b, turned, out, (j, out_step), (k, out_step), (i, 1))


def weigh_columns(b, rows, first, count, weights, taps, out, new, n, height, columns, narrow):
    """Do the same along each row: rows [height, n], out [height, 3 * new], both R, G, B, R, G, B, …

    height, n and 3 * new >= SQUARE.

    Along a row each pixel has other weights than its neighbour. So STRIP rows are transposed into
    `columns` [n, STRIP], where one weight applies to 3 * STRIP consecutive bytes.
    """
    turn, weigh = (b.module.get_global(name) for name in ("transpose", "weigh_rows"))
    strip, out_n = INT64(STRIP), b.mul(new, INT64(3))
    h = smaller(b, height, strip)
    with each(b, height, STRIP) as line:
        y = smaller(b, line, b.sub(height, h))
        b.call(turn, [address(b, rows, (y, n)), n, columns, strip, h, n])
        b.call(weigh, [columns, first, count, weights, taps, narrow, new, INT64(3 * STRIP)])
        b.call(turn, [narrow, strip, address(b, out, (y, out_n)), out_n, out_n, h])


@contextlib.contextmanager
def each(b, stop, step=1):
    """Emit `for index in range(0, stop, step)` around the body; it runs at least once."""
    before, body, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.branch(body)
    b.position_at_end(body)
    index = b.phi(INT64)
    index.add_incoming(INT64(0), before)
    yield index
    following = b.add(index, INT64(step))
    index.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, stop), body, after)
    b.position_at_end(after)


def summed(b, begin, count, term):
    """Emit begin + term(0) + … + term(count - 1)."""
    before = b.block
    with each(b, count) as index:
        total = b.phi(begin.type)
        total.add_incoming(begin, before)
        more = b.add(total, term(index))
        total.add_incoming(more, b.block)
    return more


def address(b, start, *steps):
    """Emit the address `steps` after the start; each step is an index and a size in bytes."""
    for index, size in steps:
        start = b.add(start, b.mul(index, size if isinstance(size, ir.Value) else INT64(size)))
    return start


def load(b, kind, *place):
    return b.load(b.inttoptr(address(b, *place), kind.as_pointer()), align=1)


def store(b, value, *place):
    b.store(value, b.inttoptr(address(b, *place), value.type.as_pointer()), align=1)


def smaller(b, one, other):
    return b.select(b.icmp_signed("<", one, other), one, other)


def every(number):
    """Return a vector with the same number in all lanes; undefined for None."""
    return ir.Constant(SUMS, ir.Undefined if number is None else [number] * LANES)


def halved(items):
    return items[: len(items) // 2], items[len(items) // 2 :]


def compiled(*loops):
    """Compile the loops; return an object with a function for each, which takes int64s."""
    module = ir.Module()
    for loop in loops:
        count = loop.__code__.co_argcount - 1
        kind = ir.FunctionType(ir.VoidType(), [INT64] * count)
        function = ir.Function(module, kind, loop.__name__)
        b = ir.IRBuilder(function.append_basic_block())
        loop(b, *function.args)
        b.ret_void()
    with contextlib.suppress(RuntimeError):  # required before llvmlite 0.45, an error since
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    code = types.SimpleNamespace(engine=engine)  # keeps the machine code alive
    for function in module.functions:
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(function.args))
        setattr(code, function.name, kind(engine.get_function_address(function.name)))
    return code
