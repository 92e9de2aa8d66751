#!/bin/bash
# A run on Slurm that goes on by itself: it is queued anew before its time is over, and starts from its last checkpoint.
#   sbatch recipes/accelerate/slurm.sh recipes/pretrain/dinov2_vitl14_reg4.yaml runs/dinov2 --train_dir /data/images
#   sbatch --nodes 8 --export ALL,CONFIG=recipes/accelerate/fsdp2_vitg.yaml recipes/accelerate/slurm.sh RECIPE OUTPUT ...
# RECIPE and OUTPUT, a folder that all machines share, come first; other flags of pretrain.py follow.
# What was trained since the last checkpoint is trained again: choose --save_steps to match.
#SBATCH --job-name=vitreg
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# to this shell, two minutes before the end
#SBATCH --signal=B:USR1@120
set -euo pipefail

RECIPE=$1
OUTPUT=$2
shift 2
CONFIG=${CONFIG:-recipes/accelerate/multi_node.yaml}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
# no pipe to head: it would end scontrol with a signal, and pipefail the script
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT=$((20000 + SLURM_JOB_ID % 10000))

RESUME=()
if compgen -G "$OUTPUT/checkpoints/step-*" > /dev/null; then
    RESUME=(--resume_from_checkpoint latest)
fi

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# quoted once more, because every machine's shell reads it again
printf -v TRAIN '%q ' pretrain.py --config "$RECIPE" --output_dir "$OUTPUT" ${RESUME[@]+"${RESUME[@]}"} "$@"
# one launcher a machine, which knows its rank and starts a process for each GPU
LAUNCH="accelerate launch --config_file $CONFIG --num_machines $SLURM_NNODES \
    --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) --main_process_ip ${NODES[0]} --main_process_port $PORT \
    --machine_rank \$SLURM_NODEID"
# in the background, since a signal ends a wait, and the trap runs, but does not end srun
srun --kill-on-bad-exit=1 bash -c "$LAUNCH $TRAIN" &
wait $!
