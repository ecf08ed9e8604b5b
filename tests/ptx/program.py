"""A module as one list of steps, ready to execute: what each does, where it branches, what it reads and writes."""

from dataclasses import dataclass, field

import numpy as np

from tests.ptx import clusters, warp
from tests.ptx.errors import Trap, Uninitialised, UnknownInstruction
from tests.ptx.instructions import BUILDERS
from tests.ptx.parse import Function, Instruction, Label, Module, Register, Symbol, Variable
from tests.ptx.registers import Active, Modifiers, Operands

PLAIN, WARP, BARRIER, CLUSTER = "plain", "warp", "barrier", "cluster"
BRANCH, CALL, RETURN, EXIT = "branch", "call", "return", "exit"


@dataclass
class Step:
    """kind: how the machine goes on.

    execute: Active -> None; for a barrier (its id, its count or None), for a cluster's wait who may go on, for a load
    that yields who must come again, or None.
    """

    instruction: Instruction
    kind: str
    execute: object
    guard: object = None  # Active -> which of the threads take part
    target: int = -1
    members: object = None
    yields: bool = False
    watch: object = None  # looks at registers that may not have been written
    watch_guard: object = None
    guard_reads: set[Register] = field(default_factory=set)
    reads: set[Register] = field(default_factory=set)
    writes: set[Register] = field(default_factory=set)


class Program:
    """steps; the entry's first one; where threads may meet; for each call, the step behind it by the callee's name."""

    def __init__(self, module: Module, x: Operands):
        self.x, self.module = x, module
        self.steps: list[Step] = []
        self.leaders: set[int] = set()
        self.first: dict[str, int] = {}
        self.back: dict[str, np.ndarray] = {}  # of a called function: where each thread returns to
        for name in _callees_first(module):
            self._function(module.functions[name])
        self.entry = self.first[module.entry]

    def _function(self, function: Function) -> None:
        """Callees lie at lower addresses than callers, so that threads in a call run before those behind it."""
        x, start = self.x, len(self.steps)
        self.first[function.name] = start
        self.back[function.name] = np.zeros(x.threads, np.int64)
        for variable in function.locals + ([] if function.is_entry else function.params + function.returns):
            if variable.space == "param":
                x.params[variable.key] = np.zeros((x.threads, variable.size), np.uint8)
        for instruction in function.instructions:
            x.begin(instruction)
            step = self._step(instruction, function, start)
            step.reads, step.writes, step.members, step.yields = x.reads, x.writes, x.members, x.yields
            x.reads = set()
            if instruction.guard is not None:
                step.guard = x.read(instruction.guard, "pred")
            step.guard_reads = x.reads
            step.kind = WARP if x.members else step.kind
            self.steps.append(step)
            if step.kind in (BRANCH, CALL):
                self.leaders |= {step.target, len(self.steps)}
        watch_registers(self.steps[start:], start, function, x)

    def _step(self, instruction: Instruction, function: Function, start: int) -> Step:
        m = Modifiers(instruction)
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in BUILDERS:
            step = Step(instruction, PLAIN, BUILDERS[opcode](m, self.x))
        elif opcode == "bra":
            m.flag("uni")
            (label,) = m.operands(1)
            if not isinstance(label, Label):
                raise m.unknown("expected a label of this function")
            step = Step(instruction, BRANCH, None, target=start + label.index)
        elif opcode == "ret" and not function.is_entry:
            m.flag("uni")
            step = Step(instruction, RETURN, self.back[function.name])
        elif opcode in ("ret", "exit"):
            m.flag("uni")
            step = Step(instruction, EXIT, None)
        elif opcode == "call":
            step = self._call(m)
        elif opcode in ("bar", "barrier"):
            step = self._barrier(m, instruction)
        elif opcode == "trap":
            step = Step(instruction, PLAIN, _trap)
        else:
            raise m.unknown(f"opcode {opcode}{'' if operands else ', without operands,'} is not known")
        m.done()
        return step

    def _call(self, m: Modifiers) -> Step:
        m.flag("uni")
        given = [o for o in m.operands(1, 3)]
        at = next((k for k, o in enumerate(given) if isinstance(o, Symbol)), -1)
        name = given[at].name if at >= 0 else None
        if name not in self.module.functions:
            raise m.unknown(f"{name} is not a function of the module")
        callee = self.module.functions[name]
        returns, params = given[0] if at == 1 else (), given[at + 1] if len(given) > at + 1 else ()
        if (len(returns), len(params)) != (len(callee.returns), len(callee.params)):
            raise m.unknown(f"{name} takes {len(callee.params)} parameters and returns {len(callee.returns)}")
        pairs = self._buffers(m, zip(params, callee.params, strict=True))
        results = self._buffers(m, zip(returns, callee.returns, strict=True))
        step = Step(m.instruction, CALL, None, target=self.first[name])

        def enter(active: Active, behind: int) -> None:
            self.back[name][active.at] = behind
            for actual, formal in pairs:
                formal[active.at] = actual[active.at]

        def leave(active: Active) -> None:
            for actual, formal in results:
                actual[active.at] = formal[active.at]

        step.execute = (enter, leave)
        return step

    def _buffers(self, m: Modifiers, pairs):
        found = []
        for actual, formal in pairs:
            if not isinstance(actual, Variable) or actual.size != formal.size or actual.key not in self.x.params:
                raise m.unknown(f"expected a parameter of {formal.size} bytes for {formal.key}")
            found.append((self.x.params[actual.key], self.x.params[formal.key]))
        return found

    def _barrier(self, m: Modifiers, instruction: Instruction) -> Step:
        x = self.x
        if m.flag("warp"):
            m.one("sync")
            warp._membership(x, m.operands(1)[0])

            def meet(active):
                x.clocks.join(np.unique(active.threads >> 5)[:, None])

            return Step(instruction, PLAIN, meet)
        if m.flag("cluster"):
            execute, waits = clusters.barrier(m, x)
            return Step(instruction, CLUSTER if waits else PLAIN, execute)
        m.flag("cta")
        m.one("sync")
        m.flag("aligned")
        operands = m.operands(1, 2)
        reads = [x.read(operand, "u32") for operand in operands]

        def arrive(active):
            return active.full(reads[0](active)), active.full(reads[1](active)) if len(reads) > 1 else None

        return Step(instruction, BARRIER, arrive)


def _trap(active: Active) -> None:
    raise Trap("trap", int(active.threads[0]))


def _callees_first(module: Module) -> list[str]:
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UnknownInstruction(f"{name} calls itself, which is not known")
        for instruction in module.functions[name].instructions:
            if instruction.opcode == "call":
                for operand in instruction.operands:
                    if isinstance(operand, Symbol) and operand.name in module.functions:
                        visit(operand.name, (*above, name))
        if name not in order:
            order.append(name)

    visit(module.entry, ())
    return order


def watch_registers(steps: list[Step], start: int, function: Function, x: Operands) -> None:
    """Reading a register that nobody wrote is an error: a bit for each thread says whether it was written."""
    if function.doubtful is None:  # the same in each launch
        function.doubtful = _doubtful(steps, start, function)
    registers = {
        register for reads, guard_reads, writes in function.doubtful for register in reads | guard_reads | writes
    }
    written = {register: np.zeros(x.threads, bool) for register in registers}
    for step, (reads, guard_reads, writes) in zip(steps, function.doubtful, strict=True):
        step.watch = _watch(reads, writes, written)
        step.watch_guard = _watch(guard_reads, set(), written)


def _doubtful(steps: list[Step], start: int, function: Function) -> list[tuple[set[Register], ...]]:
    """What each step reads, what its guard reads and what it writes of the registers that need a look at run time.

    Most are written on every way to where they are read, and need none.
    """
    bits: dict[Register, int] = {}  # one for each register: sets of them are numbers
    for step in steps:
        for register in step.reads | step.guard_reads | step.writes:
            bits.setdefault(register, 1 << len(bits))
    unsure = [
        {register for register in step.reads | step.guard_reads if not before & bits[register]} - function.undefined
        for step, before in zip(steps, _assigned(steps, start, bits), strict=True)
    ]
    doubtful = set().union(*unsure)
    return [
        (step.reads & those, step.guard_reads & those, step.writes & doubtful)
        for step, those in zip(steps, unsure, strict=True)
    ]


def _watch(reads: set[Register], writes: set[Register], written: dict[Register, np.ndarray]):
    """None where there is nothing to look at."""
    if not reads and not writes:
        return None

    def watch(active: Active) -> None:
        for register in reads:
            bits = written[register][active.at]
            if not bits.all():
                name = register.key.partition("@")[0]
                raise Uninitialised(f"nobody has written {name}", int(active.threads[(~bits).argmax()]))
        for register in writes:
            written[register][active.at] = True

    return watch


def _assigned(steps: list[Step], start: int, bits: dict[Register, int]) -> list[int]:
    """The registers that are certainly written when each step begins; none where no way leads to it."""
    before = [-1] * len(steps)  # no way there yet
    writes = [sum(bits[register] for register in step.writes) for step in steps]
    todo = [(0, 0)]
    while todo:
        k, known = todo.pop()
        while k < len(steps) and before[k] & ~known:
            before[k] &= known
            step = steps[k]
            known = before[k] if step.guard else before[k] | writes[k]
            if step.kind == BRANCH:
                todo.append((step.target - start, known))
            if step.kind in (BRANCH, EXIT, RETURN) and not step.guard:
                break
            k += 1
    return [max(found, 0) for found in before]
