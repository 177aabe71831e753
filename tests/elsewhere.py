"""A second device for tests on machines that have none: the CPU under another name, whose tensors do not mix with the CPU's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "elsewhere"
SOURCE = Path(__file__).with_suffix(".cpp")


def install(folder: Path) -> str | None:
    """Build and register the device once a process; the library stays in ``folder``. Says why where that cannot be."""
    if hasattr(torch, NAME):
        return None
    if shutil.which("g++") is None:
        return "no g++ to build it with"
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(_built(folder))
    torch._register_device_module(NAME, _module())
    return None


def _built(folder: Path) -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = folder / f"{NAME}-{key}.so"
    if not library.exists():
        unfinished = folder / f"{os.getpid()}.so"
        headers = [f"-I{path}" for path in cpp_extension.include_paths()]
        linked = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
        command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *headers, str(SOURCE), "-o", str(unfinished), *linked]
        subprocess.run(command, check=True, timeout=300)
        unfinished.replace(library)
    return library


def _module() -> Any:
    """What torch asks of ``torch.elsewhere``."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module
