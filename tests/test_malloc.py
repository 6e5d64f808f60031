"""What the C library does with memory that is freed, in a process of its own each."""

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
KEPT = """
import resource, torch
from optimum_eggs.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults(), faults()
assert keep_freed_memory()
print(*plain, faults(), faults())
"""
GIVEN_BACK = """
import psutil, torch
from optimum_eggs.malloc import give_back_freed_memory

def resident():
    return psutil.Process().memory_info().rss >> 20

held = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each, too small for a mapping of its own
held = held[::20]
before, changed = resident(), give_back_freed_memory()
print(before, resident(), int(changed))
"""
OTHER = """
import platform
platform.libc_ver = lambda *arguments: ("", "")
from optimum_eggs.malloc import give_back_freed_memory, keep_freed_memory
print(int(keep_freed_memory()), int(give_back_freed_memory()))
"""


def printed(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return [*map(int, done.stdout.split())]


@glibc
def test_freed_memory_is_kept():
    first, again, kept_first, kept_again = printed(KEPT)
    assert min(first, again, kept_first) > 10 * kept_again


@glibc
def test_freed_memory_between_what_is_in_use_is_given_back():
    before, after, changed = printed(GIVEN_BACK)
    assert changed
    assert before - after > 90  # MiB, of 119


def test_another_c_library_is_left_alone():
    assert printed(OTHER) == [0, 0]
