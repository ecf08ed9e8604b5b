"""float32 values as 16-bit ones, of which cuBLAS multiplies by 16-bit kernels; float32 ones it does by TF32's.

A thread has EACH values; 6 bytes a value.
"""

from .build import Source
from .numba_cuda import cuda, types
from .ptx import global_address, instruction, load_global_4f, pack_bf16, pack_f16, u32, u64

i64, f32, u16 = types.int64, types.float32, types.uint16
THREADS = 256
EACH = 8
WIDE = 16  # bytes; where both arrays begin on a multiple of it, they are read and written so much at a time

store_global_4u = instruction("store_global_4u", "st.global.v4.u32 [$0], {$1,$2,$3,$4};", (), (u64,) + (u32,) * 4)


def rounded(_, *, kind):
    """values (count,) float32 -> out (count,) of `kind`, "bfloat16" or "float16", as its bits; assigns.

    To nearest, ties to even; NaN stays NaN, and what is beyond the largest number of the kind becomes inf.  wide: 1
    where both begin on a multiple of WIDE, else 0.
    """
    pack = pack_bf16 if kind == "bfloat16" else pack_f16

    def round_values(values, out, count, wide):
        first = EACH * (i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x)
        if wide != 0 and first + EACH <= count:
            a, b, c, d = load_global_4f(global_address(values, first))
            e, f, g, h = load_global_4f(global_address(values, first + 4))
            store_global_4u(global_address(out, first), pack(b, a), pack(d, c), pack(f, e), pack(h, g))
        else:
            for k in range(first, min(first + EACH, count)):
                out[k] = u16(pack(f32(0), values[k]))

    return Source(round_values, (types.CPointer(f32), types.CPointer(u16), i64, i64), THREADS)
