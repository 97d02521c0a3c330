"""Which processes join which, by flags, variables and clusters; and who is declared gone."""

import itertools
import os
import threading
import time
from types import SimpleNamespace

import pytest

from tcc_jax.config import HostsConfig
from tcc_jax.runs import hosts
from tcc_jax.runs.hosts import Peers, all_or_none, find_hosts, join_hosts
from tcc_jax.terminal import UserError

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "one,two", "TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "true"}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def surroundings(monkeypatch):
    """Return a function that sets the variables of a machine, and whether it has TPU chips."""
    from jax._src.clusters import cloud_tpu_cluster

    def surround(variables, tpu=False, metadata=None):
        for name in (*SLURM, *OPEN_MPI, *GKE, *JAX, "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
            monkeypatch.delenv(name, raising=False)
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
        answers = {} if metadata is None else metadata
        monkeypatch.setattr(
            cloud_tpu_cluster, "get_metadata", lambda key: (answers.get(key, ""), 200 if answers else 404)
        )

    return surround


EXPLICIT = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate"}


def left_to(cluster):
    return {
        "coordinator_address": None,
        "num_processes": None,
        "process_id": None,
        "cluster_detection_method": cluster,
    }


@pytest.mark.parametrize(
    ("config", "variables", "expected"),
    [
        (HostsConfig(), {}, None),
        (HostsConfig("a:1", 2, 1), {}, EXPLICIT),
        (HostsConfig(), JAX, EXPLICIT),
        (HostsConfig("b:9"), JAX, EXPLICIT | {"coordinator_address": "b:9"}),
        (HostsConfig(index=0), JAX, EXPLICIT | {"process_id": 0}),
        (HostsConfig("a:1", 2, 1), SLURM, EXPLICIT),
        (HostsConfig("a:1", 1, 0), {}, None),
        (HostsConfig(), JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        (HostsConfig(), SLURM, left_to("slurm")),
        (HostsConfig(), SLURM | {"SLURM_NTASKS": "1"}, None),
        (HostsConfig("a:1"), SLURM, left_to("slurm") | {"coordinator_address": "a:1"}),
        # A batch script of several tasks that runs us without srun.
        (HostsConfig(), {name: text for name, text in SLURM.items() if "STEP" not in name}, None),
        (HostsConfig(), OPEN_MPI, left_to("ompi")),
        (HostsConfig(), OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        # TPU variables on a machine without TPU chips.
        (HostsConfig(), GKE, None),
    ],
)
def test_flags_come_first_then_variables_then_clusters(config, variables, expected, surroundings):
    surroundings(variables)
    assert find_hosts(config) == expected


@pytest.mark.parametrize(
    ("variables", "metadata", "expected"),
    [
        (GKE, None, left_to("gketpu")),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        (GKE | {"TPU_WORKER_HOSTNAMES": "one", "MEGASCALE_NUM_SLICES": "2"}, None, left_to("gketpu")),
        (
            {"MEGASCALE_NUM_SLICES": "1"},
            {"agent-worker-number": "0", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"},
            left_to("gcetpu"),
        ),
        (
            {"MEGASCALE_NUM_SLICES": "1"},
            {"agent-worker-number": "0", "worker-network-endpoints": "a:1:10.0.0.1"},
            None,
        ),
        ({}, None, None),
    ],
)
def test_a_tpu_slice_of_several_machines_is_found(variables, metadata, expected, surroundings):
    surroundings({"MEGASCALE_NUM_SLICES": "1"} | variables, tpu=True, metadata=metadata)
    assert find_hosts(HostsConfig()) == expected


@pytest.mark.parametrize(
    ("config", "variables", "words"),
    [
        (HostsConfig("a:1"), {}, r"hosts.count \(JAX_NUM_PROCESSES\) and hosts.index \(JAX_PROCESS_ID\) must be given"),
        (HostsConfig(count=2, index=0), {}, r"hosts.coordinator \(JAX_COORDINATOR_ADDRESS\) must be given"),
        (HostsConfig(), {"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS.*JAX_PROCESS_ID"),
        (HostsConfig(), JAX | {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID = first: must be a number"),
        (HostsConfig("a:1", 2, 2), {}, "hosts.index or JAX_PROCESS_ID = 2: must be from 0 to 1"),
        (HostsConfig("a", 2, 1), {}, "hosts.coordinator or JAX_COORDINATOR_ADDRESS = a: must be ADDRESS:PORT"),
    ],
)
def test_what_is_given_by_halves_is_refused(config, variables, words, surroundings):
    surroundings(variables)
    with pytest.raises(UserError, match=words):
        find_hosts(config)


def test_joining_calls_jax_with_what_was_found(surroundings, monkeypatch):
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    surroundings({})
    assert join_hosts(HostsConfig()) is None and calls == []
    surroundings(JAX)
    preemption = hosts.jax.config.jax_enable_preemption_service
    try:
        # The recorded call joins nobody.
        assert join_hosts(HostsConfig(timeout_seconds=30)) is None
        assert hosts.jax.config.jax_enable_preemption_service is False
    finally:
        hosts.jax.config.update("jax_enable_preemption_service", preemption)
    [call] = calls
    assert call.items() >= EXPLICIT.items()
    assert call["heartbeat_timeout_seconds"] > 30


def test_others_that_cannot_be_reached_are_one_line(surroundings, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nand more")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", refuse)
    surroundings(JAX)
    with pytest.raises(UserError, match="cannot join the others at a:1: DEADLINE_EXCEEDED: no answer; start all"):
        join_hosts(HostsConfig())


class Service:
    """The part of JAX's key-value service that is used, shared by the processes of a test."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout_milliseconds):
        end = time.monotonic() + 10
        while key not in self.values:
            assert time.monotonic() < end
            time.sleep(0.001)
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def watch_of(monkeypatch):
    """Return a function that makes one process's watch, and what it says in the end; the process itself goes on."""
    from jax._src import distributed

    service = Service()
    monkeypatch.setattr(hosts, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(
        Peers,
        "_leave",
        lambda peers, message, code: (peers.on_loss(message, code == os.EX_TEMPFAIL), peers._left.set()),
    )
    monkeypatch.setattr(hosts, "atexit", SimpleNamespace(register=lambda *_: None))
    monkeypatch.setattr(hosts, "_hold_up_aborts", lambda: None)
    monkeypatch.setattr(distributed.global_state, "client", service)
    monkeypatch.setattr(distributed.global_state, "coordinator_address", "127.0.0.1:9")
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)

    def make(index, timeout):
        monkeypatch.setattr(hosts.jax, "process_index", lambda: index)
        peers, said = Peers(timeout), []
        peers.on_loss = lambda message, goes_on: said.append((message, goes_on))
        return peers, said

    return make


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_silent_process_is_named_to_the_others(watch_of):
    (first, first_said), (second, second_said) = watch_of(0, 0.5), watch_of(1, 60.0)
    second._guard = lambda: None
    with first, second:
        time.sleep(1.0)
        assert first_said == second_said == []
        # As a process that hangs: it beats no more, but is there.
        second._left.set()
        wait_for(lambda: first_said)
    assert first_said == [("process 1 has given no sign for 0 s", True)]


def test_a_beat_under_way_does_not_overwrite_the_last_word(watch_of, monkeypatch):
    monkeypatch.setattr(hosts, "_BEAT_SECONDS", 0.5)
    peers, _ = watch_of(1, 60.0)
    service, beating = peers._client, threading.Event()
    write = service.key_value_set

    def write_late(key, value, allow_overwrite=False):
        if value.isdigit():
            beating.set()
            peers._left.wait(10)
            time.sleep(0.05)
        write(key, value, allow_overwrite)

    service.key_value_set = write_late
    with peers:
        assert beating.wait(10)
    peers._beating.join(10)
    assert service.values["tcc_jax/alive/1"] == hosts._DONE


def test_a_process_that_ends_properly_is_not_missed_and_one_that_fails_is(watch_of):
    (first, said), (second, _) = watch_of(0, 1.0), watch_of(1, 60.0)
    with first:
        with second:
            time.sleep(0.2)
        time.sleep(2.0)
        assert said == []
        third, _ = watch_of(1, 60.0)
        third._tell("tcc_jax/alive/1", "failed: its disk is full")
        wait_for(lambda: said)
    # The same command would fail again.
    assert said == [("process 1 has failed: its disk is full", False)]


def test_the_others_hear_why_the_first_process_failed(watch_of):
    (first, _), (second, said) = watch_of(0, 60.0), watch_of(1, 60.0)
    second._guard = lambda: None
    with second:
        with pytest.raises(UserError), first:
            raise UserError("its disk is full")
        wait_for(lambda: said)
    assert said == [("process 0 has failed: its disk is full", False)]


def test_a_failure_waits_for_the_watch_to_say_who_is_gone(watch_of, monkeypatch):
    monkeypatch.setattr(hosts, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "_SILENCE_AFTER_FAILURE", 0.2)
    first, said = watch_of(0, 60.0)
    with first:
        with pytest.raises(RuntimeError), first.speak_first():
            raise RuntimeError("connection closed by peer")
        assert said == [("process 1 has given no sign for 0 s", True)]


@pytest.mark.parametrize(
    ("failures", "in_the_end", "answer"),
    [
        (("", "", ""), "", ""),
        (("", "", ""), "no room", "process 0: no room"),
        (("", "disk full", ""), "", "process 1: disk full"),
        (("a", "", "b: c"), "", "process 0: a; process 2: b: c"),
    ],
)
def test_all_processes_hear_the_same_and_the_first_one_finishes_if_none_failed(
    monkeypatch, failures, in_the_end, answer
):
    from jax._src import distributed

    # The processes are threads here.
    me, heard, finished = threading.local(), {}, []
    monkeypatch.setattr(distributed.global_state, "client", Service())
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: me.index)
    monkeypatch.setattr(hosts, "_numbers", itertools.repeat(7))

    def process(index):
        me.index = index
        heard[index] = all_or_none(failures[index], lambda: finished.append(index) or in_the_end)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == dict.fromkeys(range(3), answer)
    assert finished == ([] if any(failures) else [0])
