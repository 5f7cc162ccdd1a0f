"""Settings of the C library's allocator, in processes of their own."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
from jaxmodels.hardware.malloc import tune_malloc
tune_malloc()
memory = bytearray(64 * 2**20)
mapped = next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
before = open("/proc/self/statm").read().split()[1]
del memory
print(mapped, int(before) - int(open("/proc/self/statm").read().split()[1]))
"""


def run(**options):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(sys.platform != "linux" or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="these are settings of glibc on Linux")
def test_freed_memory_is_kept_and_pages_are_huge():
    kilobytes, returned = run()
    assert returned <= 16  # pages
    if not HUGE.exists() or "[never]" in HUGE.read_text():
        pytest.skip("this Linux has no huge pages")
    assert kilobytes > 32 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_under_a_limit_on_addresses_freed_memory_is_kept_all_the_same():
    _, returned = run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)))
    assert returned <= 16
