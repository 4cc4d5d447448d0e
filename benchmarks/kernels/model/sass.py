"""Parses the machine code of compiled launches for the model."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.kernels import check, machine_code
from benchmarks.kernels.check import Caught

TARGET = "sm_90"
SMS, CLOCK = 132, 1.755e9  # Hz, of an H200 under load
COPY = 4.25e12  # bytes/s of a copy on an H200
SHARED_BYTES, REGISTERS, WARPS, CTAS = 227 << 10, 65536, 64, 32  # of one SM
CLASSES = (  # classes of instructions: the first matching pattern counts
    ("LDGSTS", "LDGSTS"),
    ("CTL", "LDGDEPBAR|DEPBAR"),
    ("LDG", "LDG"),
    ("STG", "STG"),
    ("TMA", "UTMA|UBLKCP"),
    ("LDS", r"LDS\b|LDSM"),
    ("STS", "STS|STSM"),
    ("LDL", "LDL"),
    ("STL", "STL"),
    ("BAR", "BAR|WARPSYNC|BSYNC|BSSY"),
    ("SHFL", "SHFL"),
    ("REDUX", "REDUX"),
    ("MUFU", "MUFU"),
    ("HGMMA", "HGMMA|WGMMA"),
    ("HMMA", "HMMA"),
    ("FP", "FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FCHK|FSET"),
    ("HFP", "HADD2|HFMA2|HMUL2"),
    ("CVT", "F2F|F2I|I2F|F2FP|I2FP|FRND"),
    ("PRMT", "PRMT"),
    (
        "INT",
        "IMAD|IADD|LOP|SHF|LEA|ISETP|IABS|IMNMX|SEL|VIADD|VIMNMX|PLOP3|P2R|R2P|BREV|FLO|POPC",
    ),
    ("UNI", "U[A-Z]|R2UR|S2UR|S2R|CS2R|VOTE"),
    ("MOV", "MOV"),
    ("CTL", "BRA|EXIT|CALL|RET|NOP|WARPGROUP|SYNCS|FENCE|ERRBAR|MEMBAR|NANOSLEEP"),
)


class Instruction(NamedTuple):
    """`@P0`, `LDG.E.128`, `R4, [R2.64]`."""

    predicate: str
    op: str
    operands: str


class Kernel(NamedTuple):
    """A compiled launch: `ctas` fit on an SM; `loops` are first and last instructions of loops."""

    name: str
    ptx: str
    registers: int
    stack: int
    warps: int
    shared: int
    ctas: int
    code: list[Instruction]
    loops: list[tuple[int, int]]


def named(launch: Caught) -> dict[str, Any]:
    """The arguments of a launch by their names."""
    return dict(zip(launch.fn.arg_names, launch.args, strict=False), **launch.kwargs)


def compiled(launch: Caught) -> Kernel:
    """Compiles a launch with the settings and specialisation of a launch on a GPU."""
    binary = check.compile_launch(launch, check.TARGETS[TARGET])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        registers, stack = machine_code.usage(file.name)
        text = machine_code.output(machine_code.NVIDIA_BIN / "nvdisasm", "-c", file.name)
    code, loops = parse(text)
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    ctas = occupancy(registers, warps, shared)
    ptx = binary.asm["ptx"]
    return Kernel(
        launch.fn.__name__, ptx, registers, stack, warps, shared, ctas, code, loops
    )  # fmt: skip


def parse(text: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions without the padding at the end, and the loops (backward branches)."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*([.\w$]+):\s*$", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?(\S+?)(\s[^;]*)?;", line):
            code.append(Instruction(*((part or "").strip() for part in found.groups())))
    while code and code[-1].op == "NOP":
        code.pop()
    loops = []
    for i, (_, op, operands) in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", operands) if op.startswith("BRA") else None
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    return code, sorted(loops)


def kind(op: str) -> str:
    """The class of an instruction."""
    return next((name for name, pattern in CLASSES if re.match(pattern, op)), "OTHER")


def count(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions by class, and `ALL`."""
    kinds = Counter(kind(i.op) for i in code if i.op != "NOP")
    kinds["ALL"] = sum(kinds.values())
    return kinds


def width(op: str) -> int:
    """Bytes per thread of a memory access."""
    bits = re.search(r"\.[US]?(8|16|64|128)\b", op)
    return int(bits[1]) // 8 if bits else 4


def moved(code: Sequence[Instruction], warps: int) -> int:
    """Bytes that `warps` warps move in global memory, in accesses of at least 8 bytes per thread.

    Narrower accesses are statistics and scalars, which only a few lanes need.
    """
    accesses = [width(i.op) for i in code if kind(i.op) in ("LDG", "STG", "LDGSTS")]
    wide = [size for size in accesses if size >= 8]
    return sum(32 * size for size in wide or accesses) * warps


def occupancy(registers: int, warps: int, shared: int) -> int:
    """Number of CTAs that fit on an SM; its four partitions divide the registers."""
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_a_warp * 4 // warps
    by_shared = SHARED_BYTES // (shared + 1024) if shared else CTAS
    return min(by_registers, WARPS // warps, by_shared, CTAS)
