"""Runs a kernel: all blocks of the grid at once, every thread with a program counter of its own.

The threads that stand at the lowest one execute together, up to the next place where others may join them.  A strong
load lets others run first, so that a spin loop waits for the one that ends it.  With a seed, warps run one at a time,
in random order, and it is left to chance whether a load yields: this finds what depends on the order.
"""

from typing import NamedTuple

import numpy as np

from tests.ptx.errors import Deadlock, Divergence, PtxError
from tests.ptx.launch import Launch
from tests.ptx.memory import Memory
from tests.ptx.parse import Module
from tests.ptx.program import BARRIER, BRANCH, CALL, CLUSTER, EXIT, PLAIN, RETURN, WARP, Program, Step
from tests.ptx.registers import Active

READY, YIELDED, AT_BARRIER, AT_CLUSTER, AT_WARP, EXITED = range(6)
NEVER = np.iinfo(np.int64).max
IDLE_ROUNDS = 200  # of everybody polling the same addresses, in which no memory changes
RESTLESS_ROUNDS = 20_000  # of polling addresses that do change: a loop over data, or over several flags
ENDLESS_TURNS = 300_000  # without a change of memory, a barrier or an exit
UNFAIR_TURNS = 1000  # of the lowest threads, before others get theirs too
SWITCH = 1 / 8  # how often a warp is left for another at the end of a basic block, with a seed
ARRIVAL = 1 / 4  # how often an asynchronous store arrives at the end of a basic block, with a seed


class Report(NamedTuple):
    executed: int  # instructions, each counted once for each thread
    barriers: int  # that blocks or clusters have passed
    turns: int  # of the scheduler


def run(
    module: Module,
    grid,
    block,
    args,
    memory: Memory,
    dynamic_shared: int = 0,
    seed: int | None = None,
    cluster: int = 1,
) -> Report:
    """Launches the module's kernel and waits for its end.

    grid, block: int or up to three ints.  args: ints and floats in the order of the parameters; pointers are addresses.
    dynamic_shared: bytes.  seed: None runs in lock-step, an int in that random order.
    cluster: blocks, neighbours along x, that form a cluster; grid must be a multiple.
    Raises a PtxError that names the instruction, the block and the thread.
    """
    with np.errstate(all="ignore"):
        return Machine(module, Launch(module, grid, block, args, memory, dynamic_shared, cluster), seed).run()


class Machine:
    def __init__(self, module: Module, launch: Launch, seed: int | None):
        self.launch, self.x, self.clocks = launch, launch.x, launch.x.clocks
        self.program = Program(module, launch.x)
        self.random = self.x.random = None if seed is None else np.random.default_rng(seed)
        count = launch.threads
        self.pc = np.full(count, self.program.entry, np.int64)
        self.ready = self.pc.copy()  # the pc of threads that may run, NEVER for the others
        self.state = np.full(count, READY, np.int8)
        self.barrier_id, self.barrier_count = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._wait(np.flatnonzero(np.arange(count) % launch.lanes >= launch.per_block), EXITED)
        self.warp = -1  # the one that runs, with a seed
        self.barriers = self.turns = self.useful = self.idle = self.met = 0
        self.before = (-1, -1)  # changes of memory and barriers passed, at the last idle round

    def run(self) -> Report:
        while True:
            threads = self._next()
            if threads is not None:
                self._turn(threads)
            elif (self.state == EXITED).all():
                return Report(self.launch.executed, self.barriers + self.met, self.turns)
            else:
                self._stall()

    def _next(self) -> np.ndarray | None:
        """The threads whose turn it is; they share a pc."""
        if self.random is not None:
            return self._next_at_random()
        lowest = self.ready.min()
        if lowest == NEVER:
            return None
        if self.turns - self.useful > UNFAIR_TURNS and self.turns % 2:
            waiting = np.unique(self.ready)
            lowest = waiting[self.turns // 2 % (len(waiting) - (waiting[-1] == NEVER))]
        return np.flatnonzero(self.ready == lowest)

    def _next_at_random(self) -> np.ndarray | None:
        lanes = slice(32 * self.warp, 32 * self.warp + 32)
        if self.warp < 0 or (self.ready[lanes] == NEVER).all() or self.random.random() < SWITCH:
            able = np.flatnonzero(self.ready != NEVER)
            if not len(able):
                return None
            self.warp = int(self.random.choice(able)) >> 5
            lanes = slice(32 * self.warp, 32 * self.warp + 32)
        mine = self.ready[lanes]
        places = np.unique(mine[mine != NEVER])
        return np.flatnonzero(mine == self.random.choice(places)) + 32 * self.warp

    def _turn(self, threads: np.ndarray) -> None:
        """Executes from the threads' pc to the end of the basic block, or to where they have to wait."""
        active, k = Active(threads), int(self.ready[threads[0]])
        steps, leaders, changes = self.program.steps, self.program.leaders, self.x.changes
        self.turns += 1
        if self.turns - self.useful > ENDLESS_TURNS:
            raise Deadlock(self._where("an endless loop in which no memory changes", int(threads[0]), steps[k]))
        while True:
            step = steps[k]
            try:
                k = self._step(step, k, active)
            except PtxError as error:
                if error.thread is None:
                    raise
                raise type(error)(self._where(str(error), error.thread, step)) from None
            if k < 0:
                break
            if k in leaders:
                self.ready[active.at] = k
                break
        if self.x.stores.flying and self.random.random() < ARRIVAL:
            self._land()
        if self.x.clusters.passed != self.met:
            self._open_clusters()
        if self.x.changes != changes:
            self.useful = self.turns

    def _step(self, step: Step, k: int, active: Active) -> int:
        """Returns the next pc where all threads have gone on to it together; -1 where they are dealt with."""
        self.launch.executed += len(active)
        taken = active
        if step.guard is not None:
            if step.watch_guard is not None:
                step.watch_guard(active)
            takes = step.guard(active)
            if not takes.all():
                taken = Active(active.threads[takes]) if takes.any() else None
        if taken is not None and step.watch is not None:
            step.watch(taken)
        if step.kind == PLAIN and not step.yields:
            if taken is not None:
                step.execute(taken)
            return k + 1
        if taken is None:
            return k + 1
        if step.kind == WARP and taken is active and self._complete(step, taken):
            step.execute(taken)
            return k + 1
        self.ready[active.at] = k + 1
        self._leave(step, k, taken)
        return -1

    def _leave(self, step: Step, k: int, taken: Active) -> None:
        """What the threads do that do not simply go on to k + 1."""
        if step.kind == BRANCH:
            self.ready[taken.at] = step.target
        elif step.kind == PLAIN:
            again = step.execute(taken)
            if self.random is None or self.random.random() < 0.5:
                self._wait(taken.threads, YIELDED, k + 1)
            if again is not None and again.any():
                self._wait(taken.threads[again], YIELDED, k)
            self.warp = -1
        elif step.kind == CALL:
            step.execute[0](taken, k)
            self.ready[taken.at] = step.target
        elif step.kind == RETURN:
            self._return(step, taken)
        elif step.kind == WARP:
            self._wait(taken.threads, AT_WARP, k)
            self._meet(step, k, taken.threads)
        elif step.kind == BARRIER:
            identity, count = step.execute(taken)
            self._wait(taken.threads, AT_BARRIER, k)
            self.barrier_id[taken.at], self.barrier_count[taken.at] = identity, 0 if count is None else count
            self._open_barriers(taken.threads)
        elif step.kind == CLUSTER:
            self._wait(taken.threads[~step.execute(taken)], AT_CLUSTER, k)
        elif step.kind == EXIT:
            self.useful = self.turns
            self._wait(taken.threads, EXITED)
            self.x.clusters.leave(taken.threads)
            self._open_barriers(taken.threads)

    def _wait(self, threads: np.ndarray, state: int, pc: int | None = None) -> None:
        self.state[threads], self.ready[threads] = state, NEVER
        if pc is not None:
            self.pc[threads] = pc

    def _resume(self, threads: np.ndarray, ahead: int) -> None:
        self.state[threads] = READY
        self.ready[threads] = self.pc[threads] + ahead

    def _return(self, step: Step, taken: Active) -> None:
        """Back to behind the call; a function may have been called from several places."""
        back = step.execute[taken.at]
        for call in np.unique(back).tolist():
            threads = taken.threads[back == call]
            self.program.steps[call].execute[1](Active(threads))
            self.ready[threads] = call + 1

    def _complete(self, step: Step, active: Active) -> bool:
        """Whether these are whole warps, and the instruction wants whole warps."""
        lanes = active.threads
        if len(lanes) % 32 or lanes[0] % 32 or not (lanes[31::32] - lanes[::32] == 31).all():
            return False
        return bool((step.members(active) == 0xFFFFFFFF).all())

    def _meet(self, step: Step, k: int, arriving: np.ndarray) -> bool:
        """A warp-wide instruction is executed when all lanes that it names, and that still live, have come."""
        warps = np.unique(arriving >> 5)
        lanes = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        here = lanes[(self.state[lanes] == AT_WARP) & (self.pc[lanes] == k)]
        alive = (self.state[lanes] != EXITED).reshape(-1, 32)
        came = np.isin(lanes, here).reshape(-1, 32)
        bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
        missing = ((alive & ~came) * bits).sum(1, dtype=np.uint64)
        wanted = step.members(Active(here)).astype(np.uint64)
        complete = here[wanted & missing[np.searchsorted(warps, here >> 5)] == 0]
        if len(complete):
            step.execute(Active(complete))
            self._resume(complete, 1)
        return len(complete) > 0

    def _open_barriers(self, threads: np.ndarray) -> None:
        """Lets those blocks go on in which every thread has come that the barrier waits for."""
        waiting = self.state == AT_BARRIER
        if not waiting.any():
            return
        shape = (self.launch.blocks, self.launch.lanes)
        alive = (self.state != EXITED).reshape(shape).sum(1)
        touched = np.unique(threads // self.launch.lanes)
        for identity in np.unique(self.barrier_id[waiting]).tolist():
            here = (waiting & (self.barrier_id == identity)).reshape(shape)[touched]
            counts = np.where(here, self.barrier_count.reshape(shape)[touched], 0).max(1)
            wanted = np.where(counts > 0, counts, alive[touched])
            full = here.any(1) & (here.sum(1) >= wanted)
            if full.any():
                self._pass_barrier(touched[full], here[full], counts[full])

    def _pass_barrier(self, blocks: np.ndarray, here: np.ndarray, counts: np.ndarray) -> None:
        """here: (blocks, lanes), who waits.  Without a count all must wait at one place; with one, each warp must."""
        lanes = self.launch.lanes
        pcs = self.pc.reshape(-1, lanes)[blocks]
        warps = (len(blocks), -1, 32)
        for axis_shape, apply in (((len(blocks), 1, lanes), counts == 0), (warps, counts >= 0)):
            there, at = here.reshape(axis_shape), pcs.reshape(axis_shape)
            high, low = np.where(there, at, -1).max(2), np.where(there, at, NEVER).min(2)
            apart = (there.any(2) & (high != low)).any(1) & apply
            alive = (self.state.reshape(-1, lanes)[blocks] != EXITED).reshape(warps)
            torn = here.reshape(warps).any(2) & (alive & ~here.reshape(warps)).any(2)
            apart |= torn.any(1)
            if apart.any():
                k = int(apart.argmax())
                thread = int(blocks[k] * lanes + here[k].argmax())
                step = self.program.steps[int(self.pc[thread])]
                places = sorted({self.program.steps[pc].instruction.line for pc in pcs[k][here[k]].tolist()})
                why = f"the barrier is reached at different places, lines {places}, or by parts of warps"
                raise Divergence(self._where(why, thread, step))
        members = here.reshape(warps).any(2)
        first = blocks * self.launch.warps
        self.clocks.passed([first[k] + np.flatnonzero(members[k]) for k in range(len(blocks))])
        self.barriers += len(blocks)
        self.useful = self.turns
        self._resume(np.flatnonzero(here.reshape(-1)) % lanes + np.repeat(blocks, here.sum(1)) * lanes, 1)

    def _open_clusters(self) -> None:
        """Lets the threads go on that wait at a cluster's barrier at which all have come by now."""
        self.met = self.x.clusters.passed
        self.useful = self.turns
        for pc in np.unique(self.pc[self.state == AT_CLUSTER]).tolist():
            threads = np.flatnonzero((self.state == AT_CLUSTER) & (self.pc == pc))
            free = self.program.steps[pc].execute(Active(threads))
            self._resume(threads[free], 1)

    def _land(self) -> None:
        self.x.stores.arrive()
        self.x.changes += 1

    def _stall(self) -> None:
        """Nobody may run: lets the yielded threads go on, or says why nothing can ever happen again."""
        while self.x.stores.flying:
            self._land()
        for pc in np.unique(self.pc[self.state == AT_WARP]).tolist():
            threads = np.flatnonzero((self.state == AT_WARP) & (self.pc == pc))
            if self._meet(self.program.steps[pc], pc, threads):
                return
        yielded = np.flatnonzero(self.state == YIELDED)
        if len(yielded):
            self._idle(yielded)
            self._resume(yielded, 0)
            return
        stuck = np.flatnonzero((self.state != READY) & (self.state != EXITED))
        thread = int(stuck[np.argsort(self.state[stuck] != AT_WARP, kind="stable")[0]])
        step = self.program.steps[int(self.pc[thread])]
        if self.state[thread] == AT_WARP:
            raise Divergence(self._where("not all threads of the warp come here", thread, step))
        why = f"{len(stuck)} threads wait at barriers that others never reach"
        raise Deadlock(self._where(why, thread, step))

    def _idle(self, yielded: np.ndarray) -> None:
        now = (self.x.changes, self.barriers + self.met)
        cost = RESTLESS_ROUNDS // IDLE_ROUNDS if not self.x.moved else 1
        self.idle = 0 if now != self.before else self.idle + cost
        self.before, self.x.moved = now, False
        if self.idle >= RESTLESS_ROUNDS:
            thread = int(yielded[0])
            step = self.program.steps[int(self.pc[thread]) - 1]
            why = f"{len(yielded)} threads spin, and nobody writes any more{self.x.mbarriers.lacking()}"
            raise Deadlock(self._where(why, thread, step))

    def _where(self, why: str, thread: int, step: Step) -> str:
        return f"line {step.instruction.line}: `{step.instruction.text}`: {why} ({self.launch.name(thread)})"
