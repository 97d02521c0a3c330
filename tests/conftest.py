"""What must be set before JAX is imported: eight devices of the CPU for the sharding tests, compilations fast and kept.

TCC_TEST_PLATFORM=cuda runs tests on another platform: those of tests/model/test_attention.py are meant for it.
"""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TCC_TEST_PLATFORM", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the suite's time is compilation, which this halves (seven tests of steps on eight devices: 169 s to 87 s). The
# runs of integration/ leave it out. XLA_FLAGS=--xla_backend_optimization_level=3 and the like come after it and win.
if os.environ["JAX_PLATFORMS"] == "cpu":
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # A process of pytest-xdist comes here with the flags already changed.
    os.environ.setdefault("TCC_TEST_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ['TCC_TEST_XLA_FLAGS']}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# In the background a shell has Ctrl-C ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
