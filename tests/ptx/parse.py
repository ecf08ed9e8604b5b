"""PTX text -> Module: functions, their instructions with resolved operands, and the module's variables."""

import bisect
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.ptx.errors import PtxError, UnknownInstruction
from tests.ptx.types import DTYPE, NUMBER, literal

WIDTH = {name: 8 * dtype.itemsize for name, dtype in DTYPE.items()} | {"pred": 1}
SPECIAL = re.compile(
    r"%(n?tid\.[xyz]|n?ctaid\.[xyz]|laneid|n?warpid|n?smid|gridid|lanemask_(eq|le|lt|ge|gt)"
    r"|cluster_n?ctarank|cluster_n?ctaid\.[xyz]|n?clusterid\.[xyz]"
    r"|clock|clock_hi|clock64|globaltimer|globaltimer_(lo|hi)|(dynamic|total)_smem_size)"
)
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?(?:0x[0-9a-fA-F]+|\d+)))?\s*\]")
ALIGN, NAME = r"(?:\.align\s+(\d+)\s+)?", r"([%\w$]+)"
VARIABLE = re.compile(
    rf"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\s+{ALIGN}"
    rf"\.(\w+)\s+(?:\.ptr\s+(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?)?{NAME}"
    r"\s*(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?$",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Register:
    key: str  # unique in the module
    width: int  # bits; 1 for a predicate


@dataclass(frozen=True, slots=True)
class Special:
    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    index: int  # of an instruction of the same function


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str  # a function, or nothing that was declared


@dataclass(frozen=True, slots=True)
class Negated:
    register: Register


@dataclass(frozen=True, slots=True)
class Pair:
    """`first|second`: a destination and a predicate, or two predicates."""

    first: object
    second: object


@dataclass(frozen=True, slots=True)
class Address:
    base: object
    offset: int


@dataclass(frozen=True, slots=True)
class Variable:
    space: str  # global, const, shared, local, param
    key: str
    type: str
    align: int
    size: int  # bytes; 0 for the dynamic shared array
    data: bytes | None = None


class Instruction(NamedTuple):
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: Register | Negated | None
    text: str
    line: int


@dataclass
class Function:
    name: str
    params: list[Variable]
    returns: list[Variable]
    is_entry: bool
    most_threads: int | None = None  # .maxntid, .reqntid
    instructions: list[Instruction] = field(default_factory=list)
    locals: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    undefined: set[Register] = field(default_factory=set)  # the compiler says that their value does not matter
    doubtful: list | None = None  # of each instruction, registers that may not have been written: `program` finds out


@dataclass
class Module:
    """entry: the kernel's name.  params: its (type, name) in order.  static_shared: bytes."""

    entry: str
    functions: dict[str, Function]
    variables: dict[str, Variable]
    static_shared: int

    @property
    def params(self) -> list[tuple[str, str]]:
        return [(p.type, p.key) for p in self.functions[self.entry].params]


class Scope:
    """Names between two braces; inline PTX opens one and may use names that others use too."""

    def __init__(self, number: int, parent: "Scope | None"):
        self.number, self.parent = number, parent
        self.names: dict[str, object] = {}
        self.ranges: dict[str, tuple[int, int]] = {}  # `%r<5>` declares %r0 to %r4: prefix -> (width, count)

    def key(self, name: str) -> str:
        return f"{name}@{self.number}"

    def find(self, name: str):
        if name in self.names:
            return self.names[name]
        prefix = name.rstrip("0123456789")
        width, count = self.ranges.get(prefix, (0, 0))
        if prefix != name and int(name[len(prefix) :]) < count:
            return Register(self.key(name), width)
        return self.parent.find(name) if self.parent else None


def parse(text: str) -> Module:
    """Raises UnknownInstruction for declarations the interpreter does not know, PtxError for text that is not PTX."""
    code = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL)
    code = re.sub(r"//\s*implicit-def: *(\S+)", r".undefined \1;", code)
    code = re.sub(r"//[^\n]*", "", code)
    return _Parser(code).module()


class _Parser:
    def __init__(self, code: str):
        self.code, self.at, self.scopes = code, 0, 0
        self.functions: dict[str, Function] = {}
        self.outer = Scope(0, None)
        self.newlines = [match.start() for match in re.finditer("\n", code)]

    def module(self) -> Module:
        header = re.compile(r"\s*\.(version|target|address_size|file|loc)\b[^\n]*")
        while match := header.match(self.code, self.at) or self.code[self.at :].strip():
            if isinstance(match, re.Match):
                self.at = match.end()
            else:
                self.declaration()
        entries = [f.name for f in self.functions.values() if f.is_entry]
        if len(entries) != 1:
            raise PtxError(f"expected one .entry in the PTX, got {len(entries)}: {entries}")
        variables = {v.key: v for v in self.outer.names.values() if isinstance(v, Variable)}
        static = 0
        for v in variables.values():
            if v.space == "shared":
                static = -(-static // v.align) * v.align + v.size
        return Module(entries[0], self.functions, variables, static)

    def declaration(self) -> None:
        """One function or one variable at the top level."""
        end = re.compile(r"[;{=]").search(self.code, self.at)
        if end is None:
            raise PtxError(f"expected a declaration, got {self.code[self.at :].strip()[:60]!r}")
        head = self.code[self.at : end.start()].strip()
        if ".entry" in head or ".func" in head:
            function, self.at = self.function(head), end.end()
            if end.group() == "{":
                self.functions[function.name] = function
                self.body(function)
            return
        stop = self.code.index(";", self.at)
        statement, self.at = self.code[self.at : stop].strip(), stop + 1
        variable = self.variable(statement, self.outer)
        self.outer.names[variable.key.partition("@")[0]] = variable

    def function(self, head: str) -> Function:
        match = re.match(
            rf"(?:\.\w+\s+)*?\.(entry|func)\s+(?:\((.*?)\)\s*)?{NAME}\s*(?:\((.*?)\))?(.*)$", head, re.DOTALL
        )
        if match is None:
            raise PtxError(f"expected .entry or .func, got {head[:80]!r}")
        kind, returns, name, params, directives = match.groups()
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)\s*(?:,\s*(\d+)\s*(?:,\s*(\d+))?)?", directives)
        most = None
        if threads:
            most = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        scope = Scope(self.scopes + 1, self.outer)  # the number that the body's scope will have
        lists = []
        for declarations in (params, returns):
            items = [item.strip() for item in (declarations or "").split(",") if item.strip()]
            lists.append([self.variable(item, scope, bare=kind == "entry") for item in items])
        return Function(name, lists[0], lists[1], kind == "entry", most)

    def variable(self, text: str, scope: Scope, bare: bool = False) -> Variable:
        match = VARIABLE.match(text)
        if match is None or match[3] not in WIDTH:
            raise UnknownInstruction(f"line {self.line()}: declaration {text!r}")
        space, align, kind, name, count, initial = match.groups()
        each = max(WIDTH[kind] // 8, 1)
        length = int(count.strip("[] ") or 0) if count else 1
        key = name if bare or scope is self.outer else scope.key(name)
        data = _initial(initial, kind, each * length) if initial else None
        return Variable(space, key, kind, int(align or each), each * length, data)

    def body(self, function: Function) -> None:
        """Declares every name first, so that operands may refer to labels further down."""
        scope = outermost = Scope(self.next_scope(), self.outer)
        for variable in function.params + function.returns:
            outermost.names[variable.key.partition("@")[0]] = variable
        statements: list[tuple[str, int, Scope]] = []
        while True:
            token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|(\.loc\b[^\n;]*)|([^;]*?);)", re.DOTALL).match(
                self.code, self.at
            )
            if token is None:
                raise PtxError(f"line {self.line()}: expected a statement of {function.name}")
            start = token.start(token.lastindex)
            self.at = token.end()
            if token[1] == "{":
                scope = Scope(self.next_scope(), scope)
            elif token[1] == "}":
                if scope is outermost:
                    break
                scope = scope.parent
            elif token[2]:
                scope.names[token[2]] = Label(len(statements))
            elif token[4] and token[4].startswith("."):
                self.directive(token[4], scope, function)
            elif token[4]:
                statements.append((token[4], self.line(start), scope))
        function.instructions = [_instruction(*statement) for statement in statements]
        function.instructions.append(Instruction("ret", (), (), None, "the end of the function", self.line()))

    def next_scope(self) -> int:
        self.scopes += 1
        return self.scopes

    def directive(self, text: str, scope: Scope, function: Function) -> None:
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
            if kind not in WIDTH:
                raise UnknownInstruction(f"line {self.line()}: register type in {text!r}")
            for name in names.split(","):
                name, _, count = name.strip().partition("<")
                if count:
                    scope.ranges[name] = (WIDTH[kind], int(count.rstrip("> ")))
                else:
                    scope.names[name] = Register(scope.key(name), WIDTH[kind])
        elif text.startswith(".undefined"):
            function.undefined.add(scope.find(text.split()[1]))
        elif not text.startswith(".pragma"):
            variable = self.variable(text, scope)
            scope.names[variable.key.partition("@")[0]] = variable
            if variable.space == "shared":
                self.outer.names[variable.key] = variable
            elif variable.space in ("local", "param"):
                function.locals.append(variable)

    def line(self, at: int | None = None) -> int:
        return bisect.bisect_left(self.newlines, self.at if at is None else at) + 1


def _initial(text: str, kind: str, size: int) -> bytes:
    numbers = [number.strip() for number in text.strip().strip("{}").split(",")]
    if not all(NUMBER.fullmatch(number) for number in numbers):
        raise UnknownInstruction(f"initial value {text[:60]!r}")
    return b"".join(literal(number, kind).tobytes() for number in numbers).ljust(size, b"\0")


def _instruction(text: str, line: int, scope: Scope) -> Instruction:
    text = " ".join(text.split())
    match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if match is None:
        raise UnknownInstruction(f"line {line}: {text!r}")
    negated, guard, operation, rest = match.groups()
    where = f"line {line}: `{text}`"
    if guard:
        guard = _operand(f"{negated}{guard}", scope, where)
    opcode, *modifiers = operation.split(".")
    operands = tuple(_operand(part, scope, where) for part in _split(rest, where))
    return Instruction(opcode, tuple(modifiers), operands, guard, text, line)


def _split(text: str, where: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for k, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:k].strip())
            start = k + 1
    if depth:
        raise PtxError(f"{where}: expected as many closing as opening brackets")
    return [*parts, text[start:].strip()] if text.strip() else []


def _operand(text: str, scope: Scope, where: str):
    if text[:1] in "{(":
        return tuple(_operand(part, scope, where) for part in _split(text[1:-1], where))
    if text.startswith("["):
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise UnknownInstruction(f"{where}: address {text}")
        return Address(_operand(match[1], scope, where), int(match[2] or "0", 0))
    if text.startswith("!"):
        return Negated(_operand(text[1:].strip(), scope, where))
    if "|" in text:
        return Pair(*(_operand(part.strip(), scope, where) for part in text.split("|")))
    if NUMBER.fullmatch(text):
        return Immediate(text)
    found = scope.find(text)
    if found is not None:
        return found
    if SPECIAL.fullmatch(text):
        return Special(text)
    if text.startswith("%"):
        raise UnknownInstruction(f"{where}: {text} is neither declared nor a special register that is known")
    return Symbol(text)
