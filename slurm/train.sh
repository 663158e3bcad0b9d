# shellcheck shell=bash
# One process per GPU, in a job that comes back until its run is done.

run_dir=${run_dir:-runs/job-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # an array is a run for each number, with that seed
  run_dir+=/$SLURM_ARRAY_TASK_ID
  set -- "seed=$SLURM_ARRAY_TASK_ID" "$@"
fi

ulimit -c 0 # the core of a rank is as large as its memory, and would fill the run folder's disk

# USR1 comes before the time limit (--signal), TERM when the job is preempted, requeued or cancelled. The ranks then
# finish their step, write one checkpoint together and end with 75.
trap 'kill -USR1 "$step"' USR1 TERM

srun --kill-on-bad-exit=1 python -m launch train resume=auto "run_dir=$run_dir" \
  "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$SLURM_NTASKS_PER_NODE" "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step
  wait "$step"
  code=$?
done

# The job's comment counts its failures since it was last stopped in good order.
read -r state failures < <(squeue --noheader --jobs="$SLURM_JOB_ID" --format="%T %k")
failures=${failures//[!0-9]/}
case $code in
  0 | 2) exit "$code" ;; # done; or wrong input, which would be wrong again
  75) failures=0 ;;
  *) failures=$((failures + 1)) ;;
esac
if ((failures > ${max_restarts:=10})); then
  echo "exit code $code; giving up after failure $failures"
elif [[ $state == RUNNING ]]; then # else it was cancelled, or Slurm itself requeues it
  echo "exit code $code; restart $((SLURM_RESTART_COUNT + 1)), failures $failures of at most $max_restarts"
  scontrol update JobId="$SLURM_JOB_ID" Comment="$failures"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
