"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

from clipkit.training.allocator import freed_memory_kept

PIECE = 256 << 20
PROGRAM = f"""
import resource
from clipkit.training.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray({PIECE})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

print(faults())
with freed_memory_kept():
    bytearray({PIECE})
    print(faults(), held())
print(faults(), held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told so")
def test_what_is_freed_is_taken_again_inside_and_handed_back_after() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert not done.stderr
    before, inside, after = (list(map(int, line.split())) for line in done.stdout.splitlines())
    huge_pages = 3 * PIECE // (2 << 20)  # which the system may take instead of small ones
    assert before[0] >= huge_pages  # each piece is fetched anew
    assert inside[0] < before[0] / 10
    assert inside[1] > PIECE > after[1]
    assert after[0] >= huge_pages


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
