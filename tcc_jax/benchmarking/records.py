"""What a benchmark found, as JSON that says where and with what; and as a table, beside an earlier one."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tcc_jax.runs.checkpoint import packages
from tcc_jax.terminal import UserError, table

# What must be the same for two times to be compared.
_SAME = ("device", "num_devices", "processor", "environment", "versions", "corpus", "config", "steps_per_window")
_SETTINGS = ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")


def spread(windows: Sequence[float]) -> dict[str, Any]:
    """Return `median`, `min`, `max` and the values of the windows themselves."""
    return {
        "median": statistics.median(windows),
        "min": min(windows),
        "max": max(windows),
        "windows": list(windows),
    }


def surroundings() -> dict[str, Any]:
    """Return what a time depends on beside the code: device, processor, versions, settings, and how busy it was.

    `load_average` is that of the last minute, the benchmark itself included if it ran before.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **packages()},
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def read_record(path: Path, measure: str) -> dict[str, Any]:
    """Read the JSON of an earlier benchmark.

    Raises:
        UserError: no such file, not written by this command, or of another measure.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the earlier record: {error.strerror}") from None
    except ValueError:
        record = None
    results = record.get("results") if isinstance(record, dict) else None
    if not isinstance(results, dict) or "measure" not in record or not all(map(_is_result, results.values())):
        raise UserError(f"{path}: not a record of python -m tcc_jax.bench; give a file that its --json wrote")
    if record["measure"] != measure:
        raise UserError(f"{path}: is of {record['measure']}, not of {measure}; compare like with like")
    return record


def differences(record: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Return what two records do not share besides their times, such as `config.model.width: 128, earlier 64`."""
    now, before = _flat(record), _flat(earlier)
    names = [name for name in now | before if name.split(".")[0] in _SAME]
    return [
        f"{name}: {now.get(name)}, earlier {before.get(name)}" for name in names if now.get(name) != before.get(name)
    ]


def as_table(results: dict[str, Any], earlier: dict[str, Any] | None = None) -> str:
    """Lay out results as text, a line each; with earlier ones also their median and the ratio of now to then."""
    header = ["result", "median", "min", "max"] + ([] if earlier is None else ["earlier", "ratio"])
    rows = []
    for name, result in results.items():
        row = [name, *(_rounded(result[key]) if isinstance(result, dict) else "" for key in ("median", "min", "max"))]
        if not isinstance(result, dict):
            row[1] = _rounded(result)
        if earlier is not None:
            now, before = _middle(result), _middle(earlier.get(name))
            row += [_rounded(before), f"{now / before:.3f}" if now is not None and before else "-"]
        rows.append(row)
    return table(header, rows)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _is_result(result: Any) -> bool:
    return result is None or isinstance(result.get("median") if isinstance(result, dict) else result, int | float)


def _middle(result: Any) -> float | None:
    return result["median"] if isinstance(result, dict) else result


def _rounded(value: float | None) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 1000:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:,.0f}"


def processor() -> str:
    """Return the name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
