"""Puts a simulated CUDA device (device.cpp) into a torch that was built without CUDA.

`install` must come before torch is imported: torch asks once which devices there are. So whoever wants the device is a
process of its own (run.py).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["Device", "build", "install", "why_not"]

SOURCE = Path(__file__).with_name("device.cpp")
NAME, CAPABILITY, TOTAL_BYTES = "NVIDIA H100 80GB HBM3", (9, 0), 85_000_000_000


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def why_not() -> str:
    """Why there is none on this machine, or nothing."""
    if "+cu" in importlib.metadata.version("torch") or (_torch() / "lib/libtorch_cuda.so").exists():
        return "torch has CUDA of its own"
    if not sys.platform.startswith("linux") or shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the simulated device needs Linux and a C++ compiler"
    return ""


def build(library: Path) -> None:
    """Compile the device: ten seconds."""
    include = _torch() / "include"
    line = [os.environ.get("CXX", "g++"), "-O1", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(library)]
    line += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    line += [f"-L{_torch() / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(line, check=True, capture_output=True, text=True)


class Device:
    """What the device tells. held, peak: bytes. waits: how often the host waited for it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("held", "peak", "waits", "kernels"):
            getattr(library, f"simulated_{name}").restype = ctypes.c_int64

    def __getattr__(self, name: str) -> Any:
        if name not in ("held", "peak", "waits"):
            raise AttributeError(name)
        return getattr(self._library, f"simulated_{name}")()

    def kernels(self) -> Counter[str]:
        """How often each operation was launched."""
        size = self._library.simulated_kernels(None, ctypes.c_int64(0)) + 1024
        text = ctypes.create_string_buffer(size)
        self._library.simulated_kernels(text, ctypes.c_int64(size))
        return Counter({name: int(count) for name, count in (x.split("\t") for x in text.value.decode().splitlines())})

    def synchronize(self, *_: object) -> None:
        self._library.simulated_synchronize()

    def forget_peak(self, *_: object) -> None:
        self._library.simulated_forget_peak()


class _Stream:
    """The one stream there is."""

    device: Device

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        self.device.synchronize()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    device: Device

    def __init__(self, *_: object, **__: object) -> None:
        self.at = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.device.synchronize()

    def elapsed_time(self, other: _Event) -> float:
        return 1000 * (other.at - self.at)


def install(library: Path) -> Device:
    """Load what `build` made and have `torch.cuda` speak of it."""
    assert "torch" not in sys.modules, "torch has asked already which devices there are"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    device = Device(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL))
    import torch

    _Stream.device = _Event.device = device
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: SimpleNamespace(name=NAME, total_memory=TOTAL_BYTES),
        "synchronize": device.synchronize,
        "memory_allocated": lambda *_: device.held,
        "max_memory_allocated": lambda *_: device.peak,
        "reset_peak_memory_stats": device.forget_peak,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    of_the_host = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        if storage.device.type == "cpu":
            of_the_host(storage, size)
        else:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
            torch.ops.simulated.resize_storage(whole, size)

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
    return device
