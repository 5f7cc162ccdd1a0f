"""What the compiler cannot spread over devices by itself: rings of attention, and kernels on each device's part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> dict:
    done = subprocess.run([sys.executable, "tests/spread_kernels.py"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["ring", "splash", "lstm"])
def test_in_parts_equals_one_device(found, how):
    # Results and gradients, of a largest number of one: float32 sums of up to 512 numbers.
    assert found[how]
    for case, differences in found[how].items():
        assert max(differences) < 5e-6, (case, differences)


def test_a_ring_passes_keys_on_and_gathers_nothing(found):
    # Forward: keys and values. Backward: these and their gradients; the gradients once more in the last turn, and home.
    assert found["collectives"] == {"collective-permute": 2 + 4 + 2 + 2}


def test_the_memory_of_a_ring_grows_as_the_sequence_does(found):
    once, twice = found["temporaries"]
    products = 2 * 512 * 512 * 4  # of a device's queries with the keys of one turn: two heads, float32
    assert once < products and twice < 2.1 * once
