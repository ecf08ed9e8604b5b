"""CUDA kernels, written in Numba.  Installed as `gpurnn.kernels`; depends on Numba's tools alone, never on gpurnn.

numba_cuda the one door to `numba.cuda`
ptx        inline PTX, one row per instruction; code that is written out, not unrolled
pointwise  a cell's expression graph as code on registers
products   weight_hh on one SM, times a step's vector: exact float32, and bfloat16 on tensor cores
step       one time step of any cell          persistent   all time steps, in one block or in a group of blocks:
           `persistent_forward`, `persistent_backward`, and what both are made of, `group`
exchange   how the blocks of a group give each other a step: through memory (`mail`), within a block or a cluster
           (`clusters`)          waiting    when they give up, and leave
plan       which tile, blocks and exchange a kernel gets
losses     embedding     norms     optim: the rest of a training step, flat buffers 16 bytes at a time (`vectors`)
philox     random words by place          dropout   masks that nobody keeps
rounding   float32 as 16 bits          faults    the record of what went wrong
last       the last block of a launch
columns    sums of columns          moves     small copies in one launch
build      Numba -> PTX -> cubin, and the cache on disk          launch   raw pointers on CuPy's stream
"""
