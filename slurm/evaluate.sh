# shellcheck shell=bash
# The length is the array's number; the report lies in a folder of that name. A job that comes back goes on there.
srun python -m launch evaluate resume=auto "sequence_length=$((SLURM_ARRAY_TASK_ID * 1024))" \
  "run_dir=${run_dir:-runs/job-$SLURM_ARRAY_JOB_ID}/$SLURM_ARRAY_TASK_ID" "$@"
