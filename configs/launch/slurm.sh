#!/usr/bin/env bash
# Train on GPUs under Slurm: one process for each GPU, which is how JAX reads Slurm's variables. Two minutes before the
# time limit Slurm sends SIGTERM, the run saves, and the job queues again; so it does after a preemption, and where the
# processes that are left of a training say so by exit code 75.
#
#   RUN=/shared/runs/first CORPUS=/shared/corpora/mine \
#     sbatch [--nodes=1 ...] configs/launch/slurm.sh configs/tcc_120m.toml [--section.field value ...]
#
# Submit it from the top of a clone, with .venv (pip install -c constraints.txt ".[cuda12]"), on a file system that all
# nodes see. RUN and CORPUS may be gs:// paths (".[cuda12,gcs]"). Options of sbatch go before those below.
#SBATCH --job-name=tcc-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
: "${RUN:?the run directory}" "${CORPUS:?the corpus}" "${1:?the TOML file of the run}"
# A preemption signals this shell too: it must outlive the training.
trap : TERM

code=0
# srun does not take the number of cores from the lines above.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python -m tcc_jax.train "$@" --run.directory "$RUN" --data.corpus "$CORPUS" &&
  .venv/bin/python configs/launch/finished.py "$RUN" || code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
