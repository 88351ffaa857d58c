"""The launch lines of docs/distributed.md, on two "nodes" of this machine, train what one process trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
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


def accelerate_on_node(rank, port, recipe, *options):
    return [
        *("accelerate", "launch", "--config_file", f"recipes/accelerate/{recipe}.yaml"),
        *("--num_machines", "2", "--machine_rank", rank, "--num_processes", "2"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
        *("--dynamo_backend", "no", *options),
    ]


def torchrun_on_node(rank, port, address="127.0.0.1"):
    return [
        *("torchrun", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"),
        *("--master_addr", address, "--master_port", port),
    ]


def deepspeed_on_node(rank, port, hostfile):
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


@pytest.mark.slow
def test_accelerate_ddp(tmp_path, alone):
    port = free_port()
    run = launch(
        [accelerate_on_node(rank, port, "ddp", "--mixed_precision", "no") for rank in (0, 1)], tmp_path, SETTINGS
    )
    assert (run.engine, run.world_size) == ("DistributedDataParallel", 2)
    assert_same_training(run, alone)


@pytest.mark.slow
def test_accelerate_fsdp2(tmp_path, alone):
    port = free_port()
    settings = {**with_config(SETTINGS, use_cpu=False, ddp_backend="gloo"), "fsdp_on_cpu": True}
    run = launch(
        [accelerate_on_node(rank, port, "fsdp2", "--mixed_precision", "no") for rank in (0, 1)], tmp_path, settings
    )
    assert (run.engine, run.world_size) == ("FSDPQwen3ForCausalLM", 2)
    assert_same_training(run, alone)


@pytest.mark.slow
def test_accelerate_zero3(tmp_path, alone):
    port = free_port()
    run = launch([accelerate_on_node(rank, port, "zero3") for rank in (0, 1)], tmp_path, SETTINGS)
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 3, 2)
    assert_same_training(run, alone)


@pytest.mark.slow
def test_accelerate_ulysses(tmp_path, one_process):
    port = free_port()
    sizes = ("--parallelism_config_sp_size", "2", "--parallelism_config_dp_shard_size", "1")
    run = launch([accelerate_on_node(rank, port, "ulysses", *sizes) for rank in (0, 1)], tmp_path, SETTINGS)
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 3, 2)
    assert_same_training(run, one_process(with_config(SETTINGS, gradient_accumulation_steps=1)))


@pytest.mark.slow
def test_torchrun_zero3(tmp_path, alone):
    port = free_port()
    settings = with_config(SETTINGS, deepspeed="recipes/deepspeed/zero3.json")
    run = launch([torchrun_on_node(rank, port) for rank in (0, 1)], tmp_path, settings)
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 3, 2)
    assert_same_training(run, alone)


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
    settings = with_config(SETTINGS, deepspeed="recipes/deepspeed/zero3.json")
    inside = [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"] for name in two_networks]
    run = launch([[*inside[rank], *torchrun_on_node(rank, 29500, "10.77.0.1")] for rank in (0, 1)], tmp_path, settings)
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 3, 2)
    assert_same_training(run, alone)


@pytest.mark.slow
def test_deepspeed_launcher(tmp_path, alone):
    port, hostfile = free_port(), tmp_path / "hostfile"
    hostfile.write_text((ROOT / "recipes" / "deepspeed" / "hostfile").read_text().replace("slots=8", "slots=1"))
    settings = with_config(SETTINGS, deepspeed="recipes/deepspeed/zero2.json")
    run = launch([deepspeed_on_node(rank, port, hostfile) for rank in (0, 1)], tmp_path, settings)
    assert (run.engine, run.zero_stage, run.world_size) == ("DeepSpeedEngine", 2, 2)
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
