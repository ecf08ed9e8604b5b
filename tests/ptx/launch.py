"""Sets up a launch: the shape of the grid, its memories, the kernel's parameters, the special registers."""

import numpy as np

from tests.ptx.asynchronous import Stores
from tests.ptx.clocks import Clocks
from tests.ptx.clusters import Clusters, Distributed
from tests.ptx.copies import Copies
from tests.ptx.errors import PtxError
from tests.ptx.mbarriers import Mbarriers
from tests.ptx.memory import FIRST_LOCAL, FIRST_SHARED, Memory, Space, windows
from tests.ptx.parse import WIDTH, Instruction, Module
from tests.ptx.races import Tracker
from tests.ptx.registers import Operands
from tests.ptx.types import DTYPE, UNSIGNED


def three(size) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int | np.integer) else tuple(size)
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise PtxError(f"expected one to three positive sizes, got {size}")
    return (*size, 1, 1)[:3]


class Launch:
    """A block's threads fill whole warps: those beyond `per_block` do not exist, and `lanes` counts them too.

    x: the operands' arrays.  executed: instructions so far, each counted once for each thread.
    """

    def __init__(self, module: Module, grid, block, args, memory: Memory, dynamic_shared: int, cluster: int):
        self.grid, self.block, self.cluster = three(grid), three(block), cluster
        if cluster < 1 or self.grid[0] % cluster:
            raise PtxError(f"expected a grid of whole clusters of {cluster} blocks along x, got {self.grid}")
        self.blocks, self.per_block = int(np.prod(self.grid)), int(np.prod(self.block))
        most = module.functions[module.entry].most_threads or 1024
        if self.per_block > most:
            raise PtxError(f"expected at most {most} threads in a block, got {self.block}")
        self.warps = -(-self.per_block // 32)
        self.lanes = 32 * self.warps
        self.threads = self.blocks * self.lanes
        self.executed = 0
        clocks = Clocks(self.blocks, self.warps, self.per_block, cluster, memories=1 + _restricts(module))
        symbols = memory.load(module)
        shared, size = self._shared(module, dynamic_shared, symbols)
        local, places = self._local(module)
        spaces = {"global": memory.space(), "shared": shared, "local": local}
        for name, grain in grains(module).items():
            spaces[name].tracker = _tracker(clocks, spaces[name], grain)
        special = self._special(size, dynamic_shared)
        self.x = Operands(self.threads, special, symbols, spaces, clocks)
        self.x.locals, self.x.copies = places, Copies(self.threads)
        self._clusters(shared, clocks)
        self._arguments(module, args)

    def name(self, thread: int) -> str:
        """A thread by its place in its block, and its block's in the grid."""
        block, index = divmod(thread, self.lanes)
        return f"block {_coordinates(block, self.grid)}, thread {_coordinates(index, self.block)}"

    def _shared(self, module: Module, dynamic: int, symbols: dict[str, int]) -> tuple[Space, int]:
        """Static arrays one after another, then the dynamic one, at which every array without a size begins."""
        spans, size, unsized = [], 0, []
        for v in module.variables.values():
            if v.space == "shared" and v.size:
                size = -(-size // v.align) * v.align
                spans.append((size, v.size, v.key.partition("@")[0]))
                symbols[v.key] = FIRST_SHARED + size
                size += v.size
            elif v.space == "shared":
                unsized.append(v)
        align = max((v.align for v in unsized), default=1)
        size = -(-size // align) * align
        symbols.update({v.key: FIRST_SHARED + size for v in unsized})
        if dynamic:
            spans.append((size, dynamic, "dynamic shared memory"))
        owner = np.arange(self.threads) // self.lanes
        return windows("shared", FIRST_SHARED, spans, size + dynamic, owner, self.blocks), size + dynamic

    def _clusters(self, shared: Space, clocks: Clocks) -> None:
        x, absent = self.x, np.arange(self.threads) % self.lanes >= self.per_block
        x.mbarriers = Mbarriers(clocks, shared)
        x.stores = Stores(x, shared)
        memory = x.spaces["shared::cluster"] = Distributed(shared, clocks)
        x.clusters = Clusters(clocks, x.mbarriers, memory, absent)

    def _local(self, module: Module) -> tuple[Space, dict[str, int]]:
        """Each function has its own place: none calls itself."""
        spans, size, places = [], 0, {}
        for function in module.functions.values():
            for v in function.locals:
                if v.space == "local":
                    size = -(-size // v.align) * v.align
                    places[v.key] = size
                    spans.append((size, v.size, v.key.partition("@")[0]))
                    size += v.size
        return windows("local", FIRST_LOCAL, spans, size, np.arange(self.threads), self.threads), places

    def _arguments(self, module: Module, args) -> None:
        """The kernel's parameters, as bytes."""
        params = module.functions[module.entry].params
        if len(args) != len(params):
            raise PtxError(f"expected {len(params)} arguments ({', '.join(p.type for p in params)}), got {len(args)}")
        for k, (param, value) in enumerate(zip(params, args, strict=True)):
            dtype = DTYPE[param.type]
            if param.size != dtype.itemsize:
                raise PtxError(f"argument {k}: a parameter of {param.size} bytes is not known")
            if dtype.kind != "f":
                bits = 8 * dtype.itemsize
                if int(value) != value or not -(1 << bits - 1) <= value < 1 << bits:
                    raise PtxError(f"argument {k}: expected an integer for .{param.type}, got {value!r}")
                value, dtype = int(value) % (1 << bits), UNSIGNED[dtype.itemsize]
            self.x.params[param.key] = np.frombuffer(dtype.type(value).tobytes(), np.uint8)[None, :]

    def _special(self, shared: int, dynamic: int) -> dict:
        every = np.arange(self.threads)
        thread, block, lane = every % self.lanes, every // self.lanes, every % 32
        values = {
            **{"laneid": lane, "warpid": thread // 32, "nwarpid": self.warps, "smid": block, "nsmid": self.blocks},
            **{"gridid": 0, "dynamic_smem_size": dynamic, "total_smem_size": shared},
            **{"lanemask_eq": 1 << lane, "lanemask_lt": (1 << lane) - 1, "lanemask_le": (2 << lane) - 1},
            **{"lanemask_gt": (1 << 32) - (2 << lane), "lanemask_ge": (1 << 32) - (1 << lane)},
        }
        rank = block % self.cluster
        values |= {"cluster_ctarank": rank, "cluster_nctarank": self.cluster}
        below_t = below_b = 1
        for axis, t, b in zip("xyz", self.block, self.grid, strict=True):
            values |= {f"tid.{axis}": thread // below_t % t, f"ntid.{axis}": t}
            values |= {f"ctaid.{axis}": block // below_b % b, f"nctaid.{axis}": b}
            along, mine = (self.cluster, rank) if axis == "x" else (1, 0)
            values |= {f"cluster_ctaid.{axis}": mine, f"cluster_nctaid.{axis}": along}
            values |= {f"clusterid.{axis}": block // below_b % b // along, f"nclusterid.{axis}": b // along}
            below_t, below_b = below_t * t, below_b * b
        special = {f"%{k}": np.broadcast_to(np.asarray(v, np.uint64), self.threads) for k, v in values.items()}
        clocks = ("clock", "clock64", "globaltimer", "globaltimer_lo")
        return special | {f"%{name}": lambda: self.executed for name in clocks}


def _coordinates(index: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, _ = shape
    return index % x, index // x % y, index // (x * y)


def grains(module: Module) -> dict[str, int]:
    """The smallest access that the kernel makes to global and to shared memory: races are told apart by that."""
    smallest = {"global": 16, "shared": 16}
    for function in module.functions.values():
        for instruction in function.instructions:
            size = _access_size(instruction)
            named = {m.partition("::")[0] for m in instruction.modifiers}
            for name in smallest.keys() & named or smallest:
                smallest[name] = min(smallest[name], size)
    return smallest


def _restricts(module: Module) -> bool:
    """Whether the kernel has fences that are restricted to shared memory."""
    every = (i for function in module.functions.values() for i in function.instructions if i.opcode == "fence")
    return any(m.startswith("sync_restrict") for i in every for m in i.modifiers)


def _access_size(instruction: Instruction) -> int:
    """In bytes; 16, the most, for what does not access these memories."""
    *modifiers, kind = instruction.modifiers or ("",)
    if instruction.opcode in ("cp", "mbarrier"):
        return 4 if instruction.opcode == "cp" else 8
    if instruction.opcode not in ("ld", "st", "atom", "red") or "param" in modifiers or "local" in modifiers:
        return 16
    return min(16, WIDTH.get(kind, 8) // 8 * (2 if "v2" in modifiers else 4 if "v4" in modifiers else 1))


def _tracker(clocks: Clocks, space: Space, grain: int) -> Tracker:
    shared = space.base is not None
    place = (lambda at: space.place(at % space.limit)) if shared else space.place
    return Tracker(clocks, len(space.words.views[1]), grain, space.limit if shared else None, place)
