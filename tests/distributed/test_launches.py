"""The launch lines of docs/distributed.md, on two "nodes" of this machine, train what one process trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from support.worker_settings import assert_same_training, read_result, with_config


ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "worker.py"
SETTINGS = {"config": {"per_device_train_batch_size": 1}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def accelerate_on_node(recipe, options, rank, port, folder):
    return [
        *("accelerate", "launch", "--config_file", f"recipes/accelerate/{recipe}.yaml"),
        *("--num_machines", "2", "--machine_rank", rank, "--num_processes", "2"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
        *("--dynamo_backend", "no", *options),
    ]


def torchrun_on_node(rank, port, folder, address="127.0.0.1"):
    return [
        *("torchrun", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"),
        *("--master_addr", address, "--master_port", port),
    ]


def deepspeed_on_node(rank, port, folder):
    hostfile = folder / "hostfile"
    hostfile.write_text((ROOT / "recipes" / "deepspeed" / "hostfile").read_text().replace("slots=8", "slots=1"))
    return [
        *("deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", rank, "--no_local_rank"),
        *("--master_addr", "127.0.0.1", "--master_port", port),
    ]


def launch(commands, folder, settings):
    """Start one launcher per node, wait for all, and return the result of rank 0."""
    path = folder / "settings.json"
    path.write_text(json.dumps({"result": str(folder / "result"), **settings}))
    nodes = []
    for node, command in enumerate(commands):
        with (folder / f"node{node}.log").open("w") as log:
            line = [str(word) for word in (*command, WORKER, path)]
            nodes.append(subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [node.wait(timeout=400) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    log = "".join(path.read_text() for path in sorted(folder.glob("node*.log")))
    assert codes == [0] * len(nodes), log[-6000:]
    return read_result(folder / "result")


@pytest.fixture(scope="module")
def alone(one_process):
    return one_process(with_config(SETTINGS, per_device_train_batch_size=2))


def recipe(name):
    return with_config(SETTINGS, deepspeed=f"recipes/deepspeed/{name}.json")


ULYSSES = ("--parallelism_config_sp_size", "2", "--parallelism_config_dp_shard_size", "1")
FSDP2 = {**with_config(SETTINGS, use_cpu=False, ddp_backend="gloo"), "fsdp_on_cpu": True}
FULL_PRECISION = ("--mixed_precision", "no")
# How a node is launched, the settings, and how the model is wrapped.
LAUNCHES = {
    "accelerate, DDP": (partial(accelerate_on_node, "ddp", FULL_PRECISION), SETTINGS, "DistributedDataParallel", None),
    "accelerate, FSDP2": (partial(accelerate_on_node, "fsdp2", FULL_PRECISION), FSDP2, "FSDPQwen3ForCausalLM", None),
    "accelerate, ZeRO-3": (partial(accelerate_on_node, "zero3", ()), SETTINGS, "DeepSpeedEngine", 3),
    "accelerate, Ulysses": (partial(accelerate_on_node, "ulysses", ULYSSES), SETTINGS, "DeepSpeedEngine", 3),
    "torchrun, ZeRO-3": (torchrun_on_node, recipe("zero3"), "DeepSpeedEngine", 3),
    "deepspeed, ZeRO-2": (deepspeed_on_node, recipe("zero2"), "DeepSpeedEngine", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_two_nodes(tmp_path, one_process, name):
    make, settings, engine, stage = LAUNCHES[name]
    port = free_port()
    run = launch([make(rank, port, tmp_path) for rank in (0, 1)], tmp_path, settings)
    assert (run.engine, run.zero_stage, run.world_size) == (engine, stage, 2)
    rows_per_step = 1 if "Ulysses" in name else 2
    assert_same_training(run, one_process(with_config(SETTINGS, per_device_train_batch_size=rows_per_step)))


@pytest.fixture
def two_networks():
    """Names of two network namespaces with a cable between them, 10.77.0.1 at the end in the first."""
    names = [f"singlepass{os.getpid()}{side}" for side in "ab"]
    cable = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
    lines = [*(["netns", "add", name] for name in names), cable]
    for number, name in enumerate(names, start=1):
        lines.append(["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable"])
        lines += [["-n", name, "link", "set", device, "up"] for device in ("lo", "cable")]
    try:
        try:
            for line in lines:
                subprocess.run(["ip", *line], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_networks(tmp_path, alone, two_networks):
    """Two nodes that reach each other over a network only."""
    inside = [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"] for name in two_networks]
    commands = [[*inside[rank], *torchrun_on_node(rank, 29500, tmp_path, "10.77.0.1")] for rank in (0, 1)]
    run = launch(commands, tmp_path, recipe("zero3"))
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 3, 2)
    assert_same_training(run, alone)


SLURM = {
    "srun": '#!/bin/bash\nshift\necho $$ > {folder}/pid\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"\n',
    "scancel": "#!/bin/bash\nkill -USR1 $(cat {folder}/pid)\n",
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {folder}/requeued\n',
}
"""Stand-ins for SLURM's commands, for one task."""


@pytest.mark.slow
def test_slurm_script_saves_and_is_queued_again(tmp_path):
    """A signal to the script becomes a checkpoint, exit code 0 and a place in the queue."""
    commands = tmp_path / "bin"
    commands.mkdir()
    settings = with_config(SETTINGS, max_steps=100_000, save_steps=100_000, save_strategy="steps", disable_tqdm=True)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"result": str(tmp_path / "result"), **settings}))
    for name, text in SLURM.items():
        (commands / name).write_text(text.format(folder=tmp_path))
        (commands / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    environment = {**ENVIRONMENT, **variables, "PATH": f"{commands}:{ENVIRONMENT['PATH']}"}
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            ["bash", ROOT / "recipes" / "slurm" / "train.sh", WORKER, path], cwd=ROOT, env=environment, stdout=output
        )
    try:
        deadline = time.monotonic() + 300
        while "'loss'" not in log.read_text():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == 0
    finally:
        job.kill()
        job.wait()
    assert list((tmp_path / "out").glob("checkpoint-*"))
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
