"""python configs/launch/finished.py RUN: exit with 0 if the run has finished, with 75 if the same command goes on.

Called after a training that exited with 0. One that was asked to stop does that too, and engines take 0 for the end.
"""

import json
import sys

from etils import epath

path = epath.Path(sys.argv[1]) / "status.json"
# A training stopped in its first seconds has written nothing.
state = json.loads(path.read_text())["state"] if path.exists() else "stopped"
sys.exit(0 if state == "finished" else 75)
