#!/usr/bin/env bash
# What srun runs on each node: node.sh START ARGUMENTS-OF-DEEPSPEED...
#
# Exit code 0: it came to its end, or left on request (the trainers' 85; or SIGTERM, which a preempted job gets), of which the file START.left tells. 85
# must not be a failure to srun: other nodes may still be leaving. Anything else is a failure, after which srun ends the other nodes; the node and its code
# are a line of START.failed.
set -uo pipefail
start=$1 && shift
code=0 asked=
trap 'asked=yes' TERM
# `deepspeed` gives its ranks the GPUs 0 to N-1, whatever SLURM says (UUIDs: of those that the job sees)
own=$(seq -s, 0 $((RANKS_PER_NODE - 1))) gpus=${SLURM_GPUS_ON_NODE:-0} seen=${CUDA_VISIBLE_DEVICES:-}
if [ "$gpus" -gt 0 ] && [ "$RANKS_PER_NODE" -gt "$gpus" ]; then
  echo "error: RANKS_PER_NODE=$RANKS_PER_NODE: SLURM gives the job $gpus GPUs on this node; leave it out for a rank a GPU" >&2
  code=2
elif [ "$gpus" -gt 0 ] && [[ $seen =~ ^[0-9,]+$ && "$seen," != "$own",* ]]; then
  echo "error: CUDA_VISIBLE_DEVICES=$seen: deepspeed would take the GPUs $own, which may be another job's; submit with --exclusive" >&2
  code=2
else
  # SIGTERM goes to every process of the step. The `deepspeed` command dies of it at once, its child gives the ranks 30 s to save: the pipe is open until the
  # last of them has left, and only then this task ends, with which SLURM kills whatever is left of it.
  deepspeed --node_rank "$SLURM_NODEID" "$@" 2>&1 | (trap '' TERM; exec cat) || code=$?
fi
if [ "$asked" ]; then
  case $code in 0 | 85 | 143) ;; *) echo "ended with exit code $code after SIGTERM, perhaps without saving: the job goes on from the newest checkpoint" ;; esac
  code=TERM
fi
# the file counts, also where a full disk leaves it empty; if it cannot be made, srun's exit code
if [ "$code" = TERM ] || [ "$code" = 85 ]; then touch "$start.left" || exit 85; exit 0; fi
if [ "$code" -ne 0 ]; then echo "$SLURMD_NODENAME $code" >> "$start.failed"; fi
exit "$code"
