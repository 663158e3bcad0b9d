# shellcheck shell=bash
# The length is the array's number; the report lies in a folder of that name.
srun python -m launch evaluate "sequence_length=$((SLURM_ARRAY_TASK_ID * 1024))" \
  "run_dir=${run_dir:-runs/job-$SLURM_ARRAY_JOB_ID}/$SLURM_ARRAY_TASK_ID" "$@"
