"""The last block of a launch finds what all others have written, and does what is to be done at the end."""

from .numba_cuda import cuda, types
from .ptx import global_address, instruction, u64

i64 = types.int64
count_block = instruction("count_block", "atom.acq_rel.gpu.global.add.u64 $0, [$1], $2;", (u64,), (u64, u64))


@cuda.jit(device=True)
def is_last(done):
    """Whether the other blocks have all been here; by all threads of each block, once.

    done (1,) int64: 0 before the launch, and after it.
    """
    flag = cuda.shared.array(1, types.int32)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        before = i64(count_block(global_address(done, 0), u64(1)))
        flag[0] = before == i64(cuda.gridDim.x) - 1
        if before == i64(cuda.gridDim.x) - 1:
            done[0] = 0
    cuda.syncthreads()
    return flag[0] != 0
