#!/usr/bin/env bash
# What srun runs on each node: node.sh FAILED ARGUMENTS-OF-DEEPSPEED...
#
# Exit code 0: complete, or left on request (the trainers' 85; or SIGTERM, which a preempted job gets). Anything else is a failure, after which srun ends the
# other nodes; the node and its code are a line of the file FAILED. 85 must not be a failure to srun: other nodes may still be leaving.
set -uo pipefail
failed=$1 && shift
code=0 asked=
trap 'asked=yes' TERM
# SIGTERM goes to every process of the step. The `deepspeed` command dies of it at once, its child gives the ranks 30 s to save: the pipe is open until the last
# of them has left, and only then this task ends, with which SLURM kills whatever is left of it.
deepspeed --node_rank "$SLURM_NODEID" "$@" 2>&1 | (trap '' TERM; exec cat) || code=$?
if [ $code -eq 85 ] || [ "$asked" ]; then exit 0; fi
if [ $code -ne 0 ]; then echo "$SLURMD_NODENAME $code" >> "$failed"; fi
exit $code
