"""The launch recipes, as far as that goes without a cluster: parsed, and run with stand-ins for what they call."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcc_jax.config import parse_command_line

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "configs" / "launch"
RECIPES = ["slurm.sh", "tpu_vm.sh", "xpk.sh"]
ARGUMENTS = ["configs/laptop.toml", "--training.steps", "7", "--model.position", "rope"]
CLOUD = dict(PROJECT="project", ZONE="zone", BUCKET="bucket", NAME="first", CORPUS="mine")

# Flags from the synopses of https://cloud.google.com/sdk/gcloud/reference, and from src/xpk/parser of
# https://github.com/AI-Hypercomputer/xpk.
GCLOUD = {
    "compute tpus queued-resources create": "zone runtime-version accelerator-type topology type node-id node-count "
    "node-prefix async data-disk description guaranteed internal-ips labels metadata metadata-from-file network range "
    "reserved scopes service-account shielded-secure-boot spot subnetwork tags",
    "compute tpus queued-resources delete": "zone async force",
    "compute tpus queued-resources describe": "zone",
    "compute tpus tpu-vm scp": "compress dry-run force-key-file-overwrite internal-ip plain recurse scp-flag "
    "ssh-key-file strict-host-key-checking worker zone",
    "compute tpus tpu-vm ssh": "dry-run force-key-file-overwrite internal-ip plain ssh-flag ssh-key-file "
    "strict-host-key-checking worker zone command output-directory",
    "storage cat": "display-url range",
}
GCLOUD_WIDE = "project format quiet verbosity"
XPK_WORKLOAD_CREATE = (
    "project zone cluster workload tpu-type device-type num-slices num-nodes docker-image base-docker-image script-dir "
    "command max-restarts restart-on-exit-codes termination-grace-period-seconds priority env env-file spot on-demand "
    "reservation ttl-seconds-after-finished storage scheduler"
)
# https://slurm.schedmd.com/sbatch.html and srun.html, those that take a value.
SBATCH = (
    "account array begin chdir comment constraint cpus-per-gpu cpus-per-task dependency error exclude export gpus "
    "gpus-per-node gpus-per-task gres job-name mail-type mail-user mem mem-per-cpu mem-per-gpu nodelist nodes ntasks "
    "ntasks-per-node open-mode output partition qos reservation signal time time-min"
)
SBATCH_ALONE = "contiguous exclusive hold no-requeue overcommit requeue spread-job"
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html; job_recovery also from examples/managed-jobs.html.
SKY = {
    "": "name workdir num_nodes resources envs secrets file_mounts volumes setup run config",
    "resources": "infra accelerators accelerator_args cpus memory instance_type use_spot disk_size disk_tier "
    "network_tier max_hourly_cost image_id ports labels autostop any_of ordered job_recovery",
    "job_recovery": "strategy max_restarts_on_errors recover_on_exit_codes",
}

STAND_IN = """#!{python}
# Writes down how it was called; then prints and exits as the next answer to such a call says.
import json, os, sys
from pathlib import Path
folder, call = Path({folder!r}), [Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls", "a") as file:
    print(json.dumps(call), file=file)
answers = json.loads((folder / "answers").read_text())
for key, values in answers.items():
    if " ".join(call).startswith(key) and values:
        answer = values.pop(0)
        (folder / "answers").write_text(json.dumps(answers))
        print(answer.get("prints", ""))
        sys.exit(answer.get("exits", 0))
"""


class Engines:
    """Stand-ins for the commands of engines, on PATH and as .venv/bin, and what they were called with."""

    def __init__(self, folder, *commands):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / ".venv").symlink_to(".")
        for command in commands:
            (folder / "bin" / command).write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            (folder / "bin" / command).chmod(0o755)

    def run(self, *words, answers=None, **variables):
        """Run bash with these words; return its exit code, and the calls that were made."""
        (self.folder / "answers").write_text(json.dumps(answers or {}))
        (self.folder / "calls").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), "TMPDIR": str(self.folder), **variables}
        self.done = subprocess.run(
            ["bash", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60
        )
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return self.done.returncode, [call for call in calls if call[0] != "sleep"]


def flags_of(call):
    """Return the flags of a call, with their values, and the other arguments."""
    flags = dict(word[2:].partition("=")[::2] for word in call if word.startswith("--"))
    return flags, [word for word in call if not word.startswith("--")]


def check_training(words, directory, corpus):
    """Check that a command line, as words, trains with the configuration the recipe was given."""
    assert Path(words[0]).name == "python" and words[1:3] == ["-m", "tcc_jax.train"]
    config = parse_command_line([str(ROOT / words[3]), *words[4:]])
    assert (config.run.directory, config.data.corpus) == (directory, corpus)
    assert (config.training.steps, config.model.position) == (7, "rope")


def test_every_file_is_tested_here():
    names = sorted(path.name for path in LAUNCH.iterdir() if path.is_file())
    assert names == sorted([*RECIPES, "Dockerfile", "finished.py", "sky.yaml"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_scripts_parse(recipe):
    subprocess.run(["bash", "-n", str(LAUNCH / recipe)], check=True)
    text = (LAUNCH / recipe).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    # What is expanded outside quotes is split at spaces, but in an assignment and after case.
    for line in text.splitlines():
        if re.match(r"\s*(\w+=|case )", line):
            continue
        code = re.sub(r"'[^']*'|\"(?:\\.|\$\([^)]*\)|[^\"\\])*\"|#.*", "", line)
        assert not re.search(r"\$[{\w@]", code), line
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(LAUNCH / recipe)], check=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_set_is_named_and_nothing_is_called(recipe, tmp_path):
    engines = Engines(tmp_path, "gcloud", "xpk", "docker", "srun", "scontrol", "git")
    required = set(re.findall(r"\$\{([A-Z]+):\?", (LAUNCH / recipe).read_text()))
    given = dict.fromkeys(required, "x")
    for name in required:
        code, calls = engines.run(
            LAUNCH / recipe, *ARGUMENTS, **{key: value for key, value in given.items() if key != name}
        )
        assert code != 0 and not calls
        assert f"{name}: " in engines.done.stderr
    code, calls = engines.run(LAUNCH / recipe, **given)
    assert code != 0 and not calls and "TOML file" in engines.done.stderr


def status(state):
    """What `gcloud storage cat` prints of a run's status.json."""
    return {"prints": json.dumps({"format_version": 1, "state": state, "step": 3, "steps": 7})}


DESCRIBE, SSH, CAT = (
    f"gcloud {command}"
    for command in ("compute tpus queued-resources describe", "compute tpus tpu-vm ssh", "storage cat")
)
ACTIVE, LOST, GONE = {"prints": "ACTIVE"}, {"exits": 255}, {"exits": 75}


def commands_of(calls):
    """Return the gcloud commands called, without their arguments, and check their flags."""
    found = []
    for call in calls:
        flags, words = flags_of(call[1:])
        command = next(known for known in GCLOUD if words[: len(known.split())] == known.split())
        assert set(flags) <= {*GCLOUD[command].split(), *GCLOUD_WIDE.split()}, call
        if command != "storage cat":
            assert flags["project"] == "project" and flags["zone"] == "zone"
        found.append(command.split()[-1])
    return found


def test_tpu_vm_trains_again_after_a_preemption(tmp_path):
    engines = Engines(tmp_path, "gcloud", "git", "sleep")
    answers = {
        # The first slice comes after a wait and is lost while training, the second before it can be used.
        DESCRIBE: [{"prints": "WAITING_FOR_RESOURCES"}, ACTIVE, {"prints": "SUSPENDED"}, ACTIVE],
        SSH: [{}, LOST, {}, {}],
        CAT: [status("training"), status("finished")],
    }
    code, (archive, *calls) = engines.run(LAUNCH / "tpu_vm.sh", *ARGUMENTS, answers=answers, **CLOUD)
    assert code == 0, engines.done.stderr
    assert commands_of(calls) == [
        *["create", "describe", "describe", "scp", "ssh", "ssh", "cat", "delete"],
        *["create", "describe", "delete"],
        *["create", "describe", "scp", "ssh", "ssh", "cat", "delete"],
    ]
    assert archive[:2] == ["git", "archive"] and flags_of(archive)[0]["output"] in calls[3]
    created, words = flags_of(calls[0])
    assert words[-1] == created["node-id"] == "tcc-first" and "spot" in created
    installs, trains = ([flags_of(call)[0] for call in calls if call[4:5] == ["ssh"]][first::2] for first in (0, 1))
    assert all(flags["worker"] == "all" for flags in installs + trains)
    assert ".[tpu,gcs]" in shlex.split(installs[0]["command"])
    assert trains[0] == trains[1]
    words = shlex.split(trains[0]["command"])
    assert words[:3] == ["cd", "tcc", "&&"]
    check_training(words[3:], "gs://bucket/runs/first", "gs://bucket/corpora/mine")


@pytest.mark.parametrize(
    ("answers", "code", "rounds"),
    [
        ({DESCRIBE: [ACTIVE], CAT: [status("finished")]}, 0, 1),
        ({DESCRIBE: [ACTIVE], SSH: [{}, {"exits": 2}], CAT: [{"exits": 1}]}, 1, 1),
        ({DESCRIBE: [ACTIVE], SSH: [{}, {"exits": 1}], CAT: [status("failed")]}, 1, 1),
        ({DESCRIBE: [ACTIVE], SSH: [{"exits": 2}], CAT: [status("training")]}, 1, 1),
        ({DESCRIBE: [{"prints": "FAILED"}]}, 1, 1),
        ({DESCRIBE: [ACTIVE] * 2, CAT: [status("stopped")] * 2}, 75, 2),
        # Process 0 said that another host is gone; it was lost itself.
        ({DESCRIBE: [ACTIVE] * 2, SSH: [{}, GONE], CAT: [status("stopped"), status("finished")]}, 0, 2),
        ({DESCRIBE: [ACTIVE] * 2, SSH: [{}, GONE], CAT: [status("training"), status("finished")]}, 0, 2),
    ],
    ids=["finished", "mistake", "failed", "no install", "no slice", "stopped", "lost", "lost first"],
)
def test_tpu_vm_ends_and_leaves_no_slice(tmp_path, answers, code, rounds):
    engines = Engines(tmp_path, "gcloud", "git", "sleep")
    ended, calls = engines.run(LAUNCH / "tpu_vm.sh", *ARGUMENTS, answers=answers, **CLOUD, ROUNDS="2")
    assert ended == code, engines.done.stderr
    commands = commands_of(calls[1:])
    assert commands.count("create") == commands.count("delete") == rounds and commands[-1] == "delete"


def test_tpu_vm_leaves_a_slice_of_that_name_alone(tmp_path):
    engines = Engines(tmp_path, "gcloud", "git", "sleep")
    refused = {"gcloud compute tpus queued-resources create": [{"exits": 1}]}
    code, calls = engines.run(LAUNCH / "tpu_vm.sh", *ARGUMENTS, answers=refused, **CLOUD)
    assert code == 1 and commands_of(calls[1:]) == ["create"]


@pytest.fixture
def xpk_command(tmp_path):
    engines = Engines(tmp_path, "docker", "xpk")
    code, calls = engines.run(LAUNCH / "xpk.sh", *ARGUMENTS, **CLOUD, CLUSTER="cluster", IMAGE="image")
    assert code == 0, engines.done.stderr
    build, push, (_, *xpk) = calls
    assert build == ["docker", "build", "--file", "configs/launch/Dockerfile", "--tag", "image", "."]
    assert push == ["docker", "push", "image"]
    flags, words = flags_of(xpk)
    assert words == ["workload", "create"] and set(flags) <= set(XPK_WORKLOAD_CREATE.split())
    assert flags["docker-image"] == "image" and flags["restart-on-exit-codes"] == "75"
    assert int(flags["max-restarts"]) > 0
    return flags["command"]


def test_xpk_trains(xpk_command):
    assert "\n" not in xpk_command
    training = xpk_command.partition("; ")[2].partition("&")[0]
    check_training(shlex.split(training), "gs://bucket/runs/first", "gs://bucket/corpora/mine")


@pytest.mark.parametrize(
    ("asked_to_stop", "train_exits", "finished_exits", "code"),
    [(False, 0, 0, 0), (True, 0, 75, 75), (False, 75, 0, 75), (False, 2, 0, 2), (False, 137, 0, 137)],
)
def test_xpk_hands_on_sigterm_and_the_exit_code(
    xpk_command, tmp_path, asked_to_stop, train_exits, finished_exits, code
):
    (tmp_path / "bin" / "python").write_text(f"""#!/bin/bash
case "$*" in
  *finished.py*) exit {finished_exits} ;;
esac
trap 'echo TERM >>{tmp_path}/heard; sleep 0.2; exit {train_exits}' TERM
echo >{tmp_path}/started
if {str(asked_to_stop).lower()}; then while true; do sleep 0.05; done; fi
exit {train_exits}
""")
    (tmp_path / "bin" / "python").chmod(0o755)
    # The shell around the command is xpk's (src/xpk/core/docker_container.py).
    around = f"""_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
({xpk_command}) & PID=$!;
while kill -0 $PID 2>/dev/null; do sleep 0.1; done;
wait $PID;
exit $?"""
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    shell = subprocess.Popen(["bash", "-c", around], env=environment, cwd=tmp_path)
    if asked_to_stop:
        for _ in range(600):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=60) == code
    heard = (tmp_path / "heard").read_text().split() if asked_to_stop else []
    assert heard == ["TERM"] * asked_to_stop


def test_dockerfile_copies_what_is_there():
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["FROM", "WORKDIR", *["COPY"] * 4, "RUN"]
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    # All that building the package reads.
    project = (ROOT / "pyproject.toml").read_text()
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "data", "tcc_jax", "configs"} == set(copied)
    assert 'readme = "README.md"' in project and '"data" = "tcc_jax/data"' in project


def test_slurm_options():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    values = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    assert len(values) == len(options) and all(option.startswith("--") for option in options)
    for name, value in values.items():
        assert name in (SBATCH if value else SBATCH_ALONE).split(), name
    # sbatch reads them only before the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert "requeue" in values and values["open-mode"] == "append"
    assert re.fullmatch(r"TERM@\d+", values["signal"]) and re.fullmatch(r"(\d+-)?\d\d:\d\d:\d\d", values["time"])
    # JAX takes the GPU with the number of the process on its node (jax/_src/clusters/slurm_cluster.py).
    assert values["ntasks-per-node"] == values["gpus-per-node"]


@pytest.mark.parametrize(("trains", "finished", "code"), [(0, 0, 0), (0, 75, 75), (75, 0, 75), (2, 0, 2)])
def test_slurm_trains_and_queues_again(tmp_path, trains, finished, code):
    engines = Engines(tmp_path, "srun", "scontrol", "python")
    answers = {"srun": [{"exits": trains}], "python configs/launch/finished.py": [{"exits": finished}]}
    variables = dict(
        RUN="/shared/runs/first", CORPUS="/shared/corpora/mine", SLURM_JOB_ID="42", SLURM_CPUS_PER_TASK="8"
    )
    ended, (srun, *others) = engines.run(LAUNCH / "slurm.sh", *ARGUMENTS, answers=answers, **variables)
    assert ended == code, engines.done.stderr
    # Since 22.05 srun has one core a task, whatever sbatch was told.
    assert srun[1:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    check_training(srun[3:], "/shared/runs/first", "/shared/corpora/mine")
    asked = [] if trains else [["python", "configs/launch/finished.py", "/shared/runs/first"]]
    assert others == asked + ([["scontrol", "requeue", "42"]] if code == 75 else [])


def test_sky_keys_and_commands(tmp_path):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    resources = task["resources"]
    for section, known in (("", task), ("resources", resources), ("job_recovery", resources["job_recovery"])):
        assert set(known) <= set(SKY[section].split())
    assert resources["use_spot"] is True and resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert resources["job_recovery"]["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    # What has no value must be given on the command line, as the header does.
    header = (LAUNCH / "sky.yaml").read_text().partition("\nname:")[0]
    assert set(re.findall(r"--env (\w+)=", header)) == {name for name, value in task["envs"].items() if not value}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)

    engines = Engines(tmp_path, "python")
    answers = {"python configs/launch/finished.py": [{"exits": 75}]}
    variables = {name: CLOUD.get(name, value) for name, value in task["envs"].items()}
    code, (train, finished) = engines.run("-c", task["run"], answers=answers, **variables)
    assert code == 75
    assert train[:3] == ["python", "-m", "tcc_jax.train"]
    config = parse_command_line([str(ROOT / train[3]), *train[4:]])
    assert config.run.directory == finished[-1] == "gs://bucket/runs/first"
    assert config.data.corpus == "gs://bucket/corpora/mine"
    answers = {"python -m tcc_jax.train": [{"exits": 75}]}
    code, calls = engines.run("-c", task["run"], answers=answers, **variables)
    assert (code, len(calls)) == (75, 1)


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 75), ("training", 75), (None, 75)])
def test_finished(tmp_path, state, code):
    if state:
        (tmp_path / "status.json").write_text(json.dumps({"format_version": 1, "state": state}))
    done = subprocess.run([sys.executable, str(LAUNCH / "finished.py"), str(tmp_path)])
    assert done.returncode == code
