"""The allocator keeps what is freed: a second step does not fetch the same memory from the kernel again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from parallax.allocator import CHOSEN, keep_freed_memory

STEPS = """
import resource, sys, torch
from parallax.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 19) for _ in range(24)]  # 2 MB each
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    plain = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env=plain)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has settings of its own")
def test_steps_after_the_first_bring_no_page_faults():
    kept, left = faults("kept"), faults("left")
    assert left > 10_000, "48 MB are 12,000 pages, 20 times"
    assert kept < left / 8


@pytest.mark.parametrize("name", CHOSEN)
def test_who_has_chosen_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()
