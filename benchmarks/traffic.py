"""What the kernels of a compiled step read and write: `python benchmarks/traffic.py FILE`, a program of XLA as text.

    export XLA_FLAGS="--xla_dump_to=hlo --xla_dump_hlo_module_re=train_step"
    python -m tcc_jax.aot configs/tcc_120m.toml --topology h200
    python benchmarks/traffic.py hlo/*train_step*gpu_after_optimizations.txt

Each kernel counts its operands and results in full, a loop's as often as it runs. Caches are left out, and so is the
time of arithmetic: for kernels that only move numbers, bytes over the bandwidth of the memory is a lower bound of their
time. Products and attention do arithmetic while they move, so theirs are counted apart.
"""

from __future__ import annotations

import collections
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
# These move nothing: they name what is there.
_NAMES = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "after-all"}
_SHOWN = 20


@dataclass(frozen=True)
class Kernel:
    """Kernels alike: their part of a step, name and result, how often they run and their bytes in all."""

    part: str
    name: str
    result: str
    runs: int
    moved: int


def kernels(text: str) -> list[Kernel]:
    """Return the kernels of a program, the ones that move most first.

    Args:
        text: an optimized HLO module.

    Raises:
        ValueError: no entry computation, or a loop whose number of runs XLA did not find.
    """
    computations: dict[str, list[tuple[str, str, str, str]]] = collections.defaultdict(list)
    inside, entry = "", ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            inside = head[2]
            entry = inside if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[inside].append((found[1], found[2], found[3], found[4]))
    if not entry:
        raise ValueError("no ENTRY computation: is this an optimized HLO module as text?")
    runs: collections.Counter[tuple[str, str, str]] = collections.Counter()
    moved: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def walk(computation: str, times: int) -> None:
        types = {name: result for name, result, _, _ in computations[computation]}
        for name, result, operation, rest in computations[computation]:
            if operation == "while":
                body, count = re.search(r"body=%?([\w.\-]+)", rest), re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                if not body or not count:
                    raise ValueError(f"{name}: a loop whose number of runs is not known")
                walk(body[1], times * int(count[1]))
            elif operation == "call" and (called := re.search(r"to_apply=%?([\w.\-]+)", rest)):
                walk(called[1], times)
            elif operation not in _NAMES:
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                key = (_part(name, rest), re.sub(r"[.\d]+$", "", name), re.sub(r"\{[^}]*\}", "", result))
                runs[key] += times
                moved[key] += times * (_size(result) + sum(_size(types.get(operand, "")) for operand in operands))

    walk(entry, 1)
    return [Kernel(*key, runs[key], count) for key, count in moved.most_common()]


def _part(name: str, rest: str) -> str:
    if "gemm" in name or "cublas" in rest:
        return "products"
    return "attention" if "cudnn" in rest else "other"


def _size(types: str) -> int:
    return sum(
        _BYTES.get(kind, 8) * math.prod(map(int, filter(None, shape.split(","))))
        for kind, shape in _ARRAY.findall(types)
    )


def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("error: give one file: a module of XLA after its optimizations, as text")
    try:
        found = kernels(Path(sys.argv[1]).read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}: {error}")
    for part in ("other", "products", "attention"):
        print(f"{part}: {sum(kernel.moved for kernel in found if kernel.part == part) / 1e9:.1f} GB")
    print("\n| GB | runs | kernel (neither product nor attention) | result |\n|--:|--:|---|---|")
    for kernel in [kernel for kernel in found if kernel.part == "other"][:_SHOWN]:
        print(f"| {kernel.moved / 1e9:.2f} | {kernel.runs} | {kernel.name} | {kernel.result[:80]} |")


if __name__ == "__main__":
    main()
