#!/bin/bash
# The papers' rows on a Slurm cluster, by Ray: sbatch tools/slurm.sh [FILE OF ROWS]; submit it again to go on.
#SBATCH --job-name=ddlib
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -eu
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Ten minutes less than the job's time, in which the checkpoints come back.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" -- \
	ddlib queue "$@" --engine ray --address auto --device cuda --minutes 230
