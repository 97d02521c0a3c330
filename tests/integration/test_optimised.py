"""The suite compiles fast and badly: what is promised to the bit is tested here as XLA compiles for users."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = [
    "tests/completion/test_sampler.py::test_a_row_has_the_same_bits_wherever_it_stands_and_whatever_is_beside_it",
    "tests/completion/test_sampler.py::test_greedy_equals_full_forward_passes_one_by_one",
]


def test_what_is_promised_to_the_bit_holds_for_optimised_programs():
    flags = "--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false"
    # A process of pytest-xdist hands down what it is.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"XLA_FLAGS": flags, "TCC_TEST_XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(".") >= len(TESTS), done.stdout[-3000:]
