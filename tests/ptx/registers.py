"""The register file, and how operands become NumPy arrays over the threads that execute an instruction."""

import numpy as np

from tests.ptx.errors import UnknownInstruction
from tests.ptx.memory import FIRST_LOCAL
from tests.ptx.parse import WIDTH, Address, Immediate, Instruction, Negated, Register, Special, Variable
from tests.ptx.types import DTYPE, SIGNED, UNSIGNED, literal


class Active:
    """The threads that execute an instruction, in order.

    at: what to index arrays over all threads with; a slice where they are neighbours, so that reading copies nothing.
    """

    __slots__ = ("at", "threads")

    def __init__(self, threads: np.ndarray):
        self.threads = threads
        first, count = int(threads[0]), len(threads)
        self.at = slice(first, first + count) if int(threads[-1]) - first + 1 == count else threads

    def __len__(self) -> int:
        return len(self.threads)

    def full(self, value) -> np.ndarray:
        """One value for each thread, where constants came as scalars."""
        value = np.asarray(value)
        return value if value.ndim else np.full(len(self.threads), value)


class Modifiers:
    """An instruction's modifiers; its builder takes those that it implements, and what is left over is an error."""

    def __init__(self, instruction: Instruction):
        self.instruction, self.left = instruction, list(instruction.modifiers)

    def flag(self, *names: str) -> bool:
        """Takes any of the names that are there."""
        found = [name for name in names if name in self.left]
        for name in found:
            self.left.remove(name)
        return bool(found)

    def one(self, *names: str, default: str | None = None) -> str:
        for name in names:
            if self.flag(name):
                return name
        if default is None:
            raise self.unknown(f"expected one of {', '.join(names)}")
        return default

    def type(self, *names: str) -> str:
        """The last modifier, which must be one of these types."""
        if not self.left or self.left[-1] not in names:
            raise self.unknown(f"expected a type of {', '.join(names)}")
        return self.left.pop()

    def done(self) -> None:
        if self.left:
            raise self.unknown(f".{self.left[0]} is not known here")

    def operands(self, least: int, most: int | None = None) -> tuple:
        given = self.instruction.operands
        if not least <= len(given) <= (most or least):
            raise self.unknown(f"expected {least} operands, got {len(given)}")
        return given

    def unknown(self, why: str) -> UnknownInstruction:
        return UnknownInstruction(f"line {self.instruction.line}: `{self.instruction.text}`: {why}")


class Operands:
    """Builds, for one instruction after another, the functions that read and write its operands.

    reads, writes, members and yields tell the machine about the present instruction.
    """

    def __init__(self, threads: int, special: dict, symbols: dict[str, int], spaces: dict, clocks):
        self.threads, self.special, self.symbols = threads, special, symbols
        self.spaces, self.clocks = spaces, clocks
        self.copies = self.mbarriers = self.stores = self.clusters = None  # what the launch has of these
        self.random = None  # the generator of a random order
        self.changes = 0  # how often memory has changed: the grid makes progress
        self.polled = np.zeros(threads, np.uint64)  # the address of each thread's last strong load
        self.moved = False  # one of these was not the one before: no spin loop
        self.file: dict[str, np.ndarray] = {}
        self.params: dict[str, np.ndarray] = {}  # (threads, bytes), or (1, bytes) for the kernel's own
        self.locals: dict[str, int] = {}  # offsets in each thread's local memory
        self.carry = np.zeros(threads, bool)  # the condition code of add.cc and its like
        self.begin(None)

    def begin(self, instruction: Instruction | None) -> None:
        self.instruction = instruction
        self.reads: set[Register] = set()
        self.writes: set[Register] = set()
        self.members = None  # of a warp-wide instruction: Active -> the lanes that must come, as masks
        self.yields = False  # others should run first: it may be the load of a spin loop

    def poll(self, active: Active, addresses: np.ndarray) -> None:
        """Notes the addresses of a strong load."""
        if not self.moved:
            self.moved = bool((self.polled[active.at] != addresses).any())
        self.polled[active.at] = addresses

    def unknown(self, why: str) -> UnknownInstruction:
        return UnknownInstruction(f"line {self.instruction.line}: `{self.instruction.text}`: {why}")

    def array(self, register: Register) -> np.ndarray:
        """All threads' values: bool, or unsigned of the register's width."""
        if register.key not in self.file:
            dtype = np.dtype("?") if register.width == 1 else UNSIGNED[register.width // 8]
            self.file[register.key] = np.zeros(self.threads, dtype)
        return self.file[register.key]

    def read(self, operand, kind: str, wider: bool = False):
        """Active -> values of PTX type `kind`: an array, or a scalar where the operand is a constant.

        wider: the register may be wider than the type, and its lower part is read, as ld, st and cvt allow.
        """
        dtype = DTYPE[kind]
        if isinstance(operand, Register):
            self._fits(operand, kind, wider)
            self.reads.add(operand)
            values = self.array(operand).view(dtype)
            if kind != "pred" and operand.width > WIDTH[kind]:
                values = values[:: operand.width // WIDTH[kind]]  # little-endian: the lower part comes first
            return lambda active: values[active.at]
        if isinstance(operand, Negated) and kind == "pred":
            read = self.read(operand.register, kind)
            return lambda active: ~read(active)
        if isinstance(operand, Special):
            return self._special(operand.name, dtype)
        if isinstance(operand, Immediate):
            constant = literal(operand.text, kind)
        else:
            constant = np.uint64(self.symbol(operand)).astype(dtype)
        return lambda active: constant

    def write(self, operand, kind: str, wider: bool = False):
        """(Active, values) -> None.  wider: a wider register takes the value extended, by its sign if any."""
        if not isinstance(operand, Register):
            if getattr(operand, "name", None) == "_":
                return lambda active, values: None
            raise self.unknown(f"expected a register, got {operand}")
        self._fits(operand, kind, wider)
        self.writes.add(operand)
        dtype = DTYPE[kind]
        array = self.array(operand)
        if kind == "pred" or operand.width == WIDTH[kind]:
            array = array.view(dtype)
        elif dtype.kind == "i":
            array = array.view(SIGNED[operand.width // 8])
        elif dtype.kind == "f":
            size = dtype.itemsize

            def put_bits(active, values):
                array[active.at] = np.asarray(values, dtype).view(UNSIGNED[size])

            return put_bits

        def put(active, values):
            array[active.at] = values

        return put

    def address(self, operand: Address):
        """Active -> one uint64 address for each thread."""
        offset = np.int64(operand.offset).astype(np.uint64)
        base = operand.base
        if isinstance(base, Register):
            read = self.read(base, f"u{base.width}")
            if base.width == 64:
                return lambda active: read(active) + offset
            short = offset.astype(np.uint32)  # 32-bit addresses, as shared memory has, wrap at 32 bits
            return lambda active: (read(active) + short).astype(np.uint64)
        constant = np.uint64(int(base.text, 0) if isinstance(base, Immediate) else self.symbol(base)) + offset
        return lambda active: np.full(len(active), constant)

    def symbol(self, operand) -> int:
        """The address of a variable, in its own state space."""
        if isinstance(operand, Variable) and operand.key in self.locals:
            return FIRST_LOCAL + self.locals[operand.key]
        name = operand.key if isinstance(operand, Variable) else getattr(operand, "name", None)
        if name not in self.symbols:
            raise self.unknown(f"{name or operand} has no address")
        return self.symbols[name]

    def _special(self, name: str, dtype: np.dtype):
        if name not in self.special:
            raise self.unknown(f"special register {name}")
        source = self.special[name]
        if callable(source):  # a clock
            return lambda active: np.uint64(source()).astype(dtype)
        values = source.astype(dtype)
        return lambda active: values[active.at]

    def _fits(self, register: Register, kind: str, wider: bool) -> None:
        if register.width != WIDTH[kind] and not (wider and 8 <= WIDTH[kind] < register.width):
            raise self.unknown(f"expected a register of {WIDTH[kind]} bits, got {register.width}")
