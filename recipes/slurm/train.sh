#!/bin/bash
# Train on SLURM, through time limits and preemption: on a signal, the run saves, exits, and is requeued.
#
#   sbatch recipes/slurm/train.sh train.py --deepspeed recipes/deepspeed/zero3.json
#
# train.py resumes from `last_good_checkpoint(output_dir)` and has a `PreemptionCallback` (docs/distributed.md).
# One task per GPU without a launcher in between, so that signals reach the training processes.
#SBATCH --job-name=singlepass
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT

told_to_stop=false
stop() {
    told_to_stop=true
    scancel --signal=USR1 "$SLURM_JOB_ID" # to the processes of all steps, not to this script
}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python "$@"' -- "$@" &
step=$!

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
done

if $told_to_stop && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
