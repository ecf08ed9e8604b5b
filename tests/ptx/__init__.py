"""A PTX interpreter: proves on a CPU the kernels that a GPU will run.

It executes PTX text, as Numba's compiler emits it, with every block of the grid alive at once, and each instruction by
NumPy over all threads that stand at it.  Beside the results it checks what a GPU does not: bounds, alignment, bytes and
registers never written, races in shared and in global memory (happens-before by vector clocks), partial warps at
warp-wide instructions, barriers that not everybody reaches, mbarriers used wrongly, shared memory of blocks that may
have exited, and grids that make no progress.

    module = parse(ptx_text)
    memory = Memory()
    address = memory.put(array, name="slots")
    run(module, grid, block, [address, 7], memory, seed=0, cluster=8)
    result = memory.get(address, array)

From below to above:

    errors, types, numbers      what can go wrong; PTX's types; its arithmetic where it is not NumPy's
    parse                       PTX text -> Module
    memory                      bytes and what is known of each
    clocks, races               who knows of what; which accesses are ordered
    mbarriers, clusters         phases; the barrier and the shared memory of a cluster of blocks
    registers, elementwise      operands as arrays; what instructions share
    arithmetic, functions, compare, bits, moves, convert, access, asynchronous, atomics, copies, synchronise, warp
                                the instructions, one small builder each; `instructions` is their table
    program                     a module as steps, and what steers threads: branches, calls, barriers
    launch, machine             the grid and its memories; scheduling
    survey                      what a kernel uses, and what of it is not known: `python -m tests.ptx KERNEL.ptx`

Its own tests are `tests/ptx_tests`; it imports nothing of the library.

Not known, and refused: bulk copies, reductions that complete at an mbarrier, wgmma, surfaces, textures.
"""
