"""What the machine offers, told without importing torch: part of every key, because it changes numbers."""

import ctypes
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path


def cores() -> int:
    """Return how many processors this process may use; of a system that does not tell, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _has_cuda() -> bool:
    """Whether there is an NVIDIA GPU that torch may use: its management library is asked, as torch does itself."""
    if version("torch").endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
        return False
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return library.nvmlInit() == 0 == library.nvmlDeviceGetCount_v2(ctypes.byref(count)) and count.value > 0


@cache
def _has_bf16_units() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX); without it bfloat16 is slower than float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def device_kind(wanted: str) -> str:
    """Resolve "auto" to "cuda" or "cpu"."""
    if wanted != "auto":
        return wanted
    return "cuda" if _has_cuda() else "cpu"


def dtype_name(wanted: str, device: str) -> str:
    """Resolve "auto" to "bfloat16" where the device has matrix units for it, else "float32"."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device == "cuda" or _has_bf16_units() else "float32"


def describe() -> dict[str, str | int]:
    """Facts for the record beside an artifact; they are not part of its identity."""
    info = os.uname()
    return {"machine": info.machine, "system": info.sysname, "cores": cores()}
