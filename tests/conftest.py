"""What must be set before JAX is imported: eight devices of the CPU for the sharding tests, compilations fast and kept.

TCC_TEST_PLATFORM=cuda runs tests on another platform: those of tests/model/test_attention.py are meant for it.
"""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TCC_TEST_PLATFORM", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the suite's time is compilation, which this halves. Tests of whole runs (integration/) leave it out.
if os.environ["JAX_PLATFORMS"] == "cpu":
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# In the background a shell has Ctrl-C ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
