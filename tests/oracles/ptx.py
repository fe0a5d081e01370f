"""The CUDA kernels as nvcc's PTX, run on the host: it becomes C++, over the emulation.

The emulation compiles the source, with host bodies in place of inline PTX. This shows what that cannot:

- whether inline PTX does what its host body does;
- what nvcc's front end moved over a barrier or the wait for a copy;
- code for other cards (__CUDA_ARCH__);
- launches of more threads than __launch_bounds__ allows, and accesses beyond the shared memory of a launch.

What ptxas then makes of the PTX, machine code, it does not show.

Registers become variables; memory, barriers and what a warp does together are the emulation's (ptx.h).
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rwkvlm import native
from rwkvlm.config import env

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cuda"
TYPES = {"pred": "bool", "f32": "float", "f64": "double"}
TYPES |= {f"{sign}{bits}": f"{'int' if sign == 's' else 'uint'}{bits}_t" for sign in "bus" for bits in (8, 16, 32, 64)}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "mad": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
PLACES = {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim"}


def why_not(architecture: str) -> str:
    """What is missing for the PTX of an architecture ("90a"); "": nothing."""
    nvcc = native.nvcc()
    if nvcc is None or shutil.which("g++") is None:
        return "needs nvcc and g++"
    known = _run(nvcc, "--list-gpu-code").split()
    return "" if f"sm_{architecture.rstrip('a')}" in known else f"no GPU of {nvcc} is a {architecture}: it knows {', '.join(known)}"


def compile_ptx(folder: Path, architecture: str, sources: list[Path]) -> Path:
    """A library as emulated_wkv7.compile_kernels makes one, of the PTX for an architecture; .cu files of cuda/, or others.

    The entry points are compiled from the source. Each kernel's own body stays unused: the linker prefers the translated one.
    """
    nvcc = native.nvcc()
    assert nvcc and len({source.stem for source in sources}) == len(sources)
    shutil.copytree(CUDA, folder / "cuda", dirs_exist_ok=True)
    _prepare(folder / "cuda")

    def compiled(source: Path) -> list[str]:
        unit, made = f"-DUNIT=of_{source.stem}", folder / source.stem
        copy, ptx, kernels = (made.with_suffix(kind) for kind in (".cu", ".ptx", ".cpp"))
        copy.write_text(_named(source.read_text()))
        where = [f"-I{x}" for x in (folder / "cuda" / source.parent.name, folder / "cuda", HERE)]
        toolkit = ["-ccbin", env.cuda_cxx(), *(f"-I{x / 'include'}" for x in native.toolkits_around(nvcc))]
        _run(nvcc, *toolkit, *native.CUDA_FLAGS, unit, f"-arch=sm_{architecture}", *where, "-ptx", copy, "-o", ptx)
        kernels.write_text(translated(ptx.read_text()))
        common = ["g++", "-std=c++20", "-fPIC", "-O1", *where]
        exact = ["-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fwrapv"]
        # The pattern fills registers that are read before they are written.
        _run(*common, *exact, "-ftrivial-auto-var-init=pattern", "-c", kernels, "-o", f"{made}.kernels.o")
        _run(*common, unit, "-x", "c++", "-c", copy, "-o", f"{made}.host.o")
        _run("objcopy", "--weaken", f"{made}.host.o")
        return [f"{made}.kernels.o", f"{made}.host.o"]

    with ThreadPoolExecutor(2) as pool:
        objects = [path for pair in pool.map(compiled, sources) for path in pair]
    # Several files may have the same kernel of a common header.
    _run("g++", "-shared", "-Wl,-z,muldefs", *objects, "-o", folder / "kernels.so")
    return folder / "kernels.so"


def _prepare(cuda: Path) -> None:
    """Changes a copy of cuda/: a kernel has a name that both compilers spell alike, and is started through ptx.h."""
    for path in cuda.glob("*/*.cuh"):
        path.write_text(_named(path.read_text()))
    for path, old, new in (
        (cuda / "emulation/cuda_emulation.h", "#define __global__ static", "#define __global__ __attribute__((noipa))"),
        (cuda / "common/device.cuh", "[=] { kernel(arguments...); }", "ptx::started(kernel, arguments...)"),
        (
            cuda / "common/device.cuh",
            '#include "../emulation/cuda_emulation.h"',
            '#include "../emulation/cuda_emulation.h"\n#include "ptx.h"',
        ),
    ):
        text = path.read_text()
        assert text.count(old) == 1, (path, old)
        path.write_text(text.replace(old, new))


def _named(source: str) -> str:
    return re.sub(r"^namespace \{", "inline namespace UNIT {", source, flags=re.M)


def _run(*command: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def translated(ptx: str) -> str:
    """A C++ file with a function of each kernel's name, which takes the address of its parameters."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    shared = re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", ptx)
    rest = re.sub(r"\.extern \.shared[^;]*;", "", ptx)
    unknown = re.search(r"^\s*(\.(shared|local|const|global)\b.*|.*\.func\b.*|\s*call\b.*)", rest, re.M)
    assert not unknown, f"not translated: {unknown and unknown[0]}"
    kernels = re.findall(r"\.entry (\w+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", rest, re.S)
    assert len(kernels) == rest.count(".entry") == rest.count("\n}")
    return '#include "ptx.h"\n' + "".join(_Kernel(shared).function(*kernel) for kernel in kernels)


def _operands(text: str) -> list[str]:
    """Split at the commas that are not in brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)] if text.strip() else []


def _statements(body: str) -> Iterator[str]:
    """Scopes' braces, labels, and what a semicolon ends; a brace within an instruction is that of a vector."""
    statement = re.compile(r"\s*(?:([{}])|(\$\w+:)|((?:[^;{}]|\{[^{};]*\})+);)")
    assert not statement.sub("", body).strip()
    for found in statement.findall(body):
        yield re.sub(r"\s+", " ", "".join(found)).strip()


def _name(register: str) -> str:
    return re.sub(r"\W", "_", register.strip())


def _bytes(kind: str) -> int:
    return int(kind[1:]) // 8


class _Kernel:
    """Translates one kernel."""

    def __init__(self, shared: list[str]) -> None:
        self.shared, self.parameters, self.lines = shared, {}, []
        self.symbol, self.sites = "", 0

    def function(self, symbol: str, parameters: str, bounds: str, body: str) -> str:
        self.symbol, end = symbol, 0
        for parameter in _operands(re.sub(r"\s+", " ", parameters)):
            found = re.fullmatch(r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr \.align \d+ )?(\w+)(?:\[(\d+)\])?", parameter)
            align, size = int(found[1] or _bytes(found[2])), int(found[4] or _bytes(found[2]))
            self.parameters[found[3]] = end = -(-end // align) * align
            end += size
        most = re.search(r"\.maxntid ([\d, ]+)", bounds)
        self.add(f"ptx::begin({end}, {math.prod(map(int, most[1].split(','))) if most else 1024});")
        for statement in _statements(body):
            try:
                self.statement(statement)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"not translated: {statement}") from error
        return f'extern "C" void {symbol}(const char* parameters) {{\n' + "\n".join(self.lines) + "\n}\n"

    def add(self, line: str) -> None:
        self.lines.append(line)

    def statement(self, text: str) -> None:
        if text in "{}":
            return self.add(text)
        if text.endswith(":"):
            return self.add(f"{_name(text[:-1])}:;")
        if found := re.fullmatch(r"\.reg \.(\w+) (.+)", text):
            for register in _operands(found[2]):
                name, _, count = register.rstrip(">").partition("<")
                names = [f"{name}{i}" for i in range(int(count))] if count else [name]
                self.add(f"{TYPES[found[1]]} " + ", ".join(map(_name, names)) + ";")
            return
        if text.startswith(".pragma"):
            return
        condition, operation, operands = re.fullmatch(r"(?:@(!?%?\w+) )?([a-z][\w.:]*)\s*(.*)", text).groups()
        if condition:
            self.add(f"if ({'!' * (condition[0] == '!')}{_name(condition.lstrip('!'))}) {{")
        self.instruction(operation.split("."), _operands(operands))
        if condition:
            self.add("}")

    def value(self, operand: str, kind: str) -> str:
        """The operand, read as of this type."""
        if operand.startswith("!"):
            return "!" + self.value(operand[1:], kind)
        if found := re.fullmatch(r"0([fd])([0-9A-F]+)", operand):  # by its bits
            raw = f"uint32_t(0x{found[2]}u)" if found[1] == "f" else f"uint64_t(0x{found[2]}u)"
            it = f"ptx::as<{'float' if found[1] == 'f' else 'double'}>({raw})"
        elif re.fullmatch(r"-?\d+", operand):
            it = f"int64_t({int(operand) % 2**64}u)"
        elif found := re.fullmatch(r"%(\w+)\.([xyz])", operand):
            it = f"uint32_t({PLACES[found[1]]}.{found[2]})"
        elif operand in self.parameters:
            it = f"reinterpret_cast<uint64_t>(parameters + {self.parameters[operand]})"
        elif operand in self.shared:
            it = "ptx::shared_base"
        else:
            it = _name(operand)
        return f"ptx::as<{TYPES[kind]}>({it})"

    def address(self, operand: str, space: str, size: int) -> str:
        """Of so many bytes there."""
        base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand).groups()
        whole = f"({self.value(base, 'u64')} + ({offset or 0}))"
        return f"ptx::in_shared({whole}, {size})" if space == "shared" else f"reinterpret_cast<char*>({whole})"

    def assign(self, register: str, expression: str) -> None:
        self.add(f"ptx::put({_name(register)}, {expression});")

    def vector(self, operand: str) -> list[str]:
        return _operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def together(self, what: str) -> None:
        """All lanes are at this very instruction."""
        self.sites += 1
        self.add(f'ptx::at("{what} {self.sites} of {self.symbol}");')

    def instruction(self, operation: list[str], x: list[str]) -> None:
        kind = operation[-1]
        cpp = TYPES.get(kind, "")
        real = kind[0] == "f"
        unsigned = f"u{kind[1:]}"
        get = lambda i, as_=kind: self.value(x[i], as_)
        match operation:
            case ["bra"] | ["bra", "uni"]:
                self.add(f"goto {_name(x[0])};")
            case ["ret"]:
                self.add("return;")
            case ["trap"]:
                self.add('emulation::fail("trap");')
            case ["mov", _] if x[0].startswith("{"):
                bits = 8 * _bytes(kind) // len(self.vector(x[0]))
                self.add(f"{{ const uint64_t whole = ptx::bits({_name(x[1])});")
                for i, register in enumerate(self.vector(x[0])):
                    self.assign(register, f"uint{bits}_t(whole >> {bits * i})")
                self.add("}")
            case ["mov", _] if x[1].startswith("{"):
                bits = 8 * _bytes(kind) // len(self.vector(x[1]))
                parts = [f"{cpp}({self.value(part, f'u{bits}')}) << {bits * i}" for i, part in enumerate(self.vector(x[1]))]
                self.assign(x[0], f"{cpp}({' | '.join(parts)})")
            case ["mov", _] | ["cvta", "to", "global", _]:
                self.assign(x[0], get(1))
            case ["cvta", "shared", _]:
                self.assign(x[0], f"reinterpret_cast<uint64_t>(ptx::in_shared({get(1)}, 0))")
            case [("add" | "sub" | "mul" | "div") as what, *how, _] if real and how in ([], ["rn"]):
                self.assign(x[0], f"{get(1)} {OPERATORS[what]} {get(2)}")
            case ["fma", ("rn" | "rm") as rounding, _]:
                self.assign(x[0], f"ptx::fma_{rounding}({get(1)}, {get(2)}, {get(3)})")
            case ["div", "approx", "f32"]:
                self.assign(x[0], f"ptx::div_approx({get(1)}, {get(2)})")
            case ["rcp", "rn", _]:
                self.assign(x[0], f"{cpp}(1) / {get(1)}")
            case ["sqrt", "rn" | "approx", _]:
                self.assign(x[0], f"std::sqrt({get(1)})")
            case ["ex2", "approx", *ftz, "f32"]:
                self.assign(x[0], f"ptx::ex2<{str(ftz == ['ftz']).lower()}>({get(1)})")
            case [("add" | "sub") as what, _] | [("mul" | "mad") as what, "lo", _]:
                more = f" + {get(3, unsigned)}" if what == "mad" else ""
                self.assign(x[0], f"{TYPES[unsigned]}({get(1, unsigned)} {OPERATORS[what]} {get(2, unsigned)}{more})")
            case ["mul", "wide", _]:
                wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
                self.assign(x[0], f"{wide}({wide}({get(1)}) * {wide}({get(2)}))")
            case ["mul", "hi", "u32" | "s32"]:
                self.assign(x[0], f"{cpp}({TYPES[kind[0] + '64']}({get(1)}) * {get(2)} >> 32)")
            case [("div" | "rem" | "min" | "max") as what, _]:
                self.assign(x[0], f"ptx::{what}({get(1)}, {get(2)})")
            case ["neg", _]:
                self.assign(x[0], f"-{get(1)}" if real else f"{TYPES[unsigned]}(0 - {get(1, unsigned)})")
            case ["abs", "f32" | "f64"]:
                self.assign(x[0], f"std::fabs({get(1)})")
            case ["not", _]:
                self.assign(x[0], f"!{get(1)}" if kind == "pred" else f"{cpp}(~{get(1)})")
            case [("and" | "or" | "xor") as what, _]:
                self.assign(x[0], f"{cpp}({get(1)} {OPERATORS[what]} {get(2)})")
            case [("shl" | "shr") as what, _]:
                self.assign(x[0], f"ptx::{what}<{cpp}>({get(1)}, {get(2, 'u32')})")
            case ["bfi", _]:
                self.assign(x[0], f"ptx::bfi<{cpp}>({get(1)}, {get(2)}, {get(3, 'u32')}, {get(4, 'u32')})")
            case ["clz", "b32"]:
                self.assign(x[0], f"uint32_t({get(1)} ? __builtin_clz({get(1)}) : 32)")
            case ["popc", "b32"]:
                self.assign(x[0], f"uint32_t(__builtin_popcount({get(1)}))")
            case ["setp", "nan", _]:
                self.assign(x[0], f"ptx::unordered({get(1)}, {get(2)})")
            case ["setp", compare, _] if real and compare[-1] == "u":
                self.assign(x[0], f"ptx::unordered({get(1)}, {get(2)}) || {get(1)} {COMPARISONS[compare[:-1]]} {get(2)}")
            case ["setp", compare, _] if not real or compare != "ne":  # C++ has the same answers for numbers that are NaN
                self.assign(x[0], f"{get(1)} {COMPARISONS[compare]} {get(2)}")
            case ["selp", _]:
                self.assign(x[0], f"{self.value(x[3], 'pred')} ? {get(1)} : {get(2)}")
            case ["cvt", *_]:
                self.conversion(operation[1:], x)
            case ["ld" | "st" | "atom", *_]:
                self.memory(operation, x)
            case ["bar", "sync"] if x == ["0"]:
                self.sites += 1
                self.add(f"__syncthreads({self.sites});")
            case ["bar", "warp", "sync"]:
                self.add(f"__syncwarp({get(0, 'u32')});")
            case ["shfl", "sync", ("up" | "bfly" | "idx") as mode, "b32"]:
                to, _, there = x[0].partition("|")
                self.add("{ bool there;")
                self.assign(to, f"ptx::shuffle<ptx::{mode}>({', '.join(get(i, 'u32') for i in (1, 2, 3, 4))}, there)")
                if there:
                    self.assign(there, "there")
                self.add("}")
            case ["cp", "async", ("cg" | "ca") as cached, "shared", "global"] if (cached == "cg") == (x[2] == "16"):
                to, of = self.address(x[0], "shared", int(x[2])), self.address(x[1], "global", int(x[2]))
                self.add(f"emulation::copy_async({to}, {of}, {x[2]}, {get(3, 'u32')});")
            case ["cp", "async", "commit_group"]:
                self.add("emulation::commit_copies();")
            case ["cp", "async", "wait_group"]:
                self.add(f"emulation::finish_copies({x[0]});")
            case ["prefetch", "global", "L2"]:
                pass
            case ["ldmatrix", "sync", "aligned", "m8n8", "x4", *transposed, "shared", "b16"] if transposed in ([], ["trans"]):
                self.together("ldmatrix")
                row = self.address(x[1], "shared", 16)
                self.add(f"{{ uint32_t x[4]; emulation::ldmatrix_x4(x, {row}, {str(bool(transposed)).lower()});")
                for i, register in enumerate(self.vector(x[0])):
                    self.assign(register, f"x[{i}]")
                self.add("}")
            case ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
                self.together("mma")
                a, b = ([self.value(register, "u32") for register in self.vector(x[i])] for i in (1, 2))
                sums = [self.value(register, "f32") for register in self.vector(x[3])]
                self.add(f"{{ float d[4] = {{{', '.join(sums)}}}; const uint32_t a[4] = {{{', '.join(a)}}}, b[2] = {{{', '.join(b)}}};")
                self.add("emulation::mma_m16n8k16(d, a, b);")
                for i, register in enumerate(self.vector(x[0])):
                    self.assign(register, f"d[{i}]")
                self.add("}")
            case _:
                raise ValueError(operation)

    def conversion(self, types: list[str], x: list[str]) -> None:
        get = lambda i, kind: self.value(x[i], kind)
        match types:
            case ["rn", "bf16x2", "f32"]:
                self.assign(x[0], f"ptx::bf16({get(2, 'f32')}) | uint32_t(ptx::bf16({get(1, 'f32')})) << 16")
            case ["rn", "bf16", "f32"]:
                self.assign(x[0], f"ptx::bf16({get(1, 'f32')})")
            case ["f32", "bf16"]:
                self.assign(x[0], f"uint32_t({get(1, 'u16')}) << 16")
            case ["sat", "f32", "f32"]:
                self.assign(x[0], f"ptx::saturated({get(1, 'f32')})")
            case [*rounding, to, of] if rounding in ([], ["rn"]) and (of[0] != "f" or to[0] == "f"):
                self.assign(x[0], f"{TYPES[to]}({get(1, of)})")
            case _:
                raise ValueError(types)

    def memory(self, operation: list[str], x: list[str]) -> None:
        what, *more, kind = operation
        space = more.pop(0) if more and more[0] in ("global", "shared", "param") else ""
        if more and more[0] in ("nc", "relaxed"):
            more = more[2 if more[0] == "relaxed" else 1 :]  # and its scope
            space = more.pop(0) if more and more[0] in ("global", "shared") else space
        registers = self.vector(x[1 if what == "st" else 0])
        cpp, place = TYPES[kind], self.address(x[0 if what == "st" else 1], space, _bytes(kind) * len(registers))
        if what == "atom":
            (function,) = more
            self.assign(x[0], f"atomic{dict(add='Add', max='Max')[function]}(&ptx::at_place<{cpp}, 1>({place}), {self.value(x[2], kind)})")
            return
        assert more == ([f"v{len(registers)}"] if len(registers) > 1 else []), operation
        self.add(f"{{ auto* const place = &ptx::at_place<{cpp}, {len(registers)}>({place});")
        if what == "st":
            for i, register in enumerate(registers):
                self.add(f"place[{i}] = {self.value(register, kind)};")
        else:  # all, before a register of the address changes
            self.add(f"const {cpp} all[] = {{{', '.join(f'place[{i}]' for i in range(len(registers)))}}};")
            for i, register in enumerate(registers):
                self.assign(register, f"all[{i}]")
        self.add("}")
