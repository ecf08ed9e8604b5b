"""weight_hh, put into the order in which the threads of a product read it: once before each pass through time."""

from .build import Source
from .numba_cuda import cuda, types
from .products import columns
from .ptx import pack_bf16, pack_f16, round_tf32
from .tiles import Ffma, Shape, Tile, layout, packed_words

i64, f32, u32 = types.int64, types.float32, types.uint32
THREADS = 256


def pack(trace, *, shape: Shape, tile: Tile, heads: int = 1) -> Source:
    """Assigns weight_hh (G*H, H), gates in the order of the slots, as `tiles.packed_words` words, block after block.

    Of several heads, each of `shape`, weight_hh (G*heads*H, H) becomes as many words for each, head after head.
    """
    return (_ffma if isinstance(tile, Ffma) else _mma)(shape, tile, heads)


def _element(shape, tile, heads):
    lay = layout(shape, tile)
    H, WIDTH, TRANSPOSED, PARTS = shape.H, lay.width, shape.transposed, shape.parts
    HEADS = heads
    unit_at = columns(lay).unit_at

    @cuda.jit(device=True)
    def element(weight, head, unit, output, k):
        """The weight between a result of a unit of this head and the vector's element k.  0 where either is padding."""
        part, other = k // WIDTH, unit_at(k % WIDTH)
        if unit >= H or other >= H or part >= PARTS:
            return f32(0)
        row = (part * HEADS + head) * H + other if TRANSPOSED else (output * HEADS + head) * H + unit
        return weight[row * H + unit] if TRANSPOSED else weight[row * H + other]

    return element


def _ffma(shape, tile, heads):
    lay = layout(shape, tile)
    UNITS, LANES, OUT, THREADS_OF, CHUNKS = tile.units, tile.lanes, shape.outputs, lay.threads, lay.chunks
    WORDS, J, OWN = packed_words(shape, tile), UNITS * OUT, lay.units
    HEADS, element = heads, _element(shape, tile, heads)

    def pack_ffma(weight, packed):
        """[block][chunk][unit of the team, output][thread][4 elements of the vector]"""
        at_word = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if at_word < HEADS * WORDS:
            head, word = at_word // WORDS, at_word % WORDS
            tid, j = word // 4 % THREADS_OF, word // (4 * THREADS_OF) % J
            c, block = word // (4 * THREADS_OF * J) % CHUNKS, word // (4 * THREADS_OF * J * CHUNKS)
            unit = tid // LANES * UNITS + j // OUT
            k = 4 * (tid % LANES + LANES * c) + word % 4
            packed[at_word] = element(weight, head, block * OWN + unit, j % OUT, k) if unit < OWN else f32(0)

    return Source(pack_ffma, (types.CPointer(f32), types.CPointer(f32)), THREADS)


def _mma(shape, tile, heads):
    """A fragments of m16n8k16 (k8 for tf32).  The order of the vector's elements within a chunk is free, if weights and
    vector agree: lane q of 4 has the q-th 16 bytes, and so two products' B fragments in one load."""
    lay = layout(shape, tile)
    GROUPS, SPLIT, OUT, OWN = tile.groups, tile.split, shape.outputs, lay.units
    TILES, WORDS, CHUNKS, CHUNK, WARPS = (
        GROUPS * OUT // 2,
        packed_words(shape, tile),
        lay.chunks,
        lay.chunk,
        lay.threads // 32,
    )
    TF32, FLOAT16 = tile.kind == "tf32", tile.kind == "float16"
    HEADS, element = heads, _element(shape, tile, heads)

    def pack_mma(weight, packed):
        """[block][warp][tile][chunk][first or second product][lane][4 words]"""
        at_word = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if at_word < HEADS * WORDS:
            head, word = at_word // WORDS, at_word % WORDS
            part, lane, second = word % 4, word // 4 % 32, word // 128 % 2
            c, at = word // 256 % CHUNKS, word // (256 * CHUNKS) % TILES
            warp, block = word // (256 * CHUNKS * TILES) % WARPS, word // (256 * CHUNKS * TILES * WARPS)
            half = 2 * at + part % 2
            unit = block * OWN + (warp // SPLIT * GROUPS + half // OUT) * 8 + lane // 4
            k = (
                CHUNK * (warp % SPLIT * CHUNKS + c)
                + CHUNK // 4 * (lane % 4)
                + CHUNK // 8 * second
                + CHUNK // 16 * (part // 2)
            )
            low = element(weight, head, unit, half % OUT, k)
            if TF32:
                packed[at_word] = round_tf32(low)
            elif FLOAT16:
                packed[at_word] = pack_f16(element(weight, head, unit, half % OUT, k + 1), low)
            else:
                packed[at_word] = pack_bf16(element(weight, head, unit, half % OUT, k + 1), low)

    return Source(pack_mma, (types.CPointer(f32), types.CPointer(u32)), THREADS)
