# shellcheck shell=bash
# What every training job runs: one process per GPU, and a job that comes back until its run is done.
asked_to_stop=false
stop() { # the ranks finish their step and write a checkpoint together
  asked_to_stop=true
  kill -USR1 "$step"
}
trap stop USR1 TERM # USR1: --signal, before the time limit; TERM: preempted, requeued or cancelled

srun --kill-on-bad-exit=1 python -m launch train resume=auto "run_dir=${run_dir:-runs/job-$SLURM_JOB_ID}" \
  "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$SLURM_NTASKS_PER_NODE" "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # only the wait was interrupted
  wait "$step"
  code=$?
done

restarts=${SLURM_RESTART_COUNT:-0}
if ((code == 0 || code == 2)); then # done; or wrong input, which would be wrong again
  exit "$code"
elif ((code == 75)) || ($asked_to_stop && ((code > 128))); then # 75: stopped with a checkpoint; >128: before it trained
  echo "stopped on request; restarts so far: $restarts"
elif ((restarts < max_restarts)); then
  echo "failed with exit code $code; restart $((restarts + 1)) of at most $max_restarts"
else
  echo "failed with exit code $code; giving up after $restarts restarts"
  exit "$code"
fi
# A job that was cancelled stays so, and one that Slurm itself requeues needs no help.
if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
