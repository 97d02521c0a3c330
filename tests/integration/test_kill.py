"""A run killed with SIGKILL at random moments and started again ends like one that was never stopped, to the bit.

`python -m benchmarks.reliability kills --count 200` does the same two hundred times.
"""

import random

from tests.integration.kills import kill_and_compare


def test_a_run_killed_twenty_times_equals_one_that_was_never_stopped(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    outcome = kill_and_compare(tmp_path, kills=20, seed=seed)
    assert sum(outcome.moments.values()) == 20
    # Not all of them may fall before the first step.
    assert sum(outcome.moments.values()) - outcome.moments["start"] >= 3, outcome
