# What the batch scripts of this folder share. They source it in the project's root, where sbatch was called.
set -euo pipefail
[ $# -gt 0 ] || { echo "error: name a recipe: sbatch launchers/slurm/NAME.sbatch recipes/NAME.yaml [further arguments]" >&2; exit 2; }
export PATH=$PWD/.venv/bin:$PATH # where there is no .venv: the environment that was active when sbatch was called

# A rank a GPU; on a cluster of CPUs RANKS_PER_NODE (sbatch --export=ALL,RANKS_PER_NODE=2 ...), by default one.
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# Without it every rank starts a thread a core: 8 ranks on 64 cores are 512 threads, which get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))}

# NCCL, the GPUs' communication. WARN: what goes wrong is in the node's log; INFO also says which network it took.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Left to NCCL, export them before sbatch where its choice is wrong:
# NCCL_SOCKET_IFNAME=ib0 (gloo: GLOO_SOCKET_IFNAME)   it waits at the start or says "connection refused": nodes have interfaces that do not reach each other
# NCCL_IB_HCA=mlx5                                    it takes the wrong InfiniBand cards
# NCCL_IB_DISABLE=1                                   to find out whether InfiniBand is what fails; slow
# TORCH_NCCL_ASYNC_ERROR_HANDLING                     is on by itself since torch 2.2: a broken connection ends the rank instead of hanging

# of an array's first task SLURM_JOB_ID is the whole array's number
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# requeue WHY: back into the queue. A job that is being cancelled, or requeued by SLURM already, is COMPLETING and stays what it is.
requeue() {
  if scontrol show job -o "$job" | grep -q ' JobState=RUNNING '; then
    echo "$1: job $job goes back into the queue and goes on from there"
    scontrol requeue "$job"
  fi
  exit 85 # whatever happens: never COMPLETED
}

# wait_for PID: its exit code in `code`. A trap ends `wait`, which then did not see the end of the process.
wait_for() {
  asked=yes
  while [ "$asked" ]; do
    asked=
    wait "$1" && code=0 || code=$?
  done
}

# train STAGE RESULT RECIPE [ARGUMENTS...]: the whole job. RESULT is the file whose presence in the output folder says that it is complete.
train() {
  stage=$1 result=$2 && shift 2
  folder=$(python -m toolkit.recipe "$stage" "$@") # a mistake in it is one line, and exit code 2
  logs=$folder/logs start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  hosts=$logs/$start.hosts failed=$logs/$start.failed
  mkdir -p "$logs"
  scontrol show hostnames | sed "s/$/ slots=$ranks/" > "$hosts"
  rm -f "$folder/STOP" "$failed" # a STOP that came too late for an earlier start

  # 180 s before the time limit (--signal), or sent by you: scancel --batch --signal=USR1 JOB
  if [ "$stage" = evaluate ]; then ask() { requeue "answers are on the disk batch by batch"; }; else ask() { asked=yes; touch "$folder/STOP"; }; fi
  trap ask USR1 TERM

  echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $stage on $SLURM_NNODES nodes of $ranks ranks; logs in $logs/$start-*.log"
  # --cpu-bind=none: the launcher's ranks may use all cores that the job has on the node
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --output="$logs/$start-%N.log" bash launchers/slurm/node.sh "$failed" \
    --hostfile "$hosts" --no_ssh --master_addr "$(scontrol show hostnames | head -n 1)" --master_port $((15000 + SLURM_JOB_ID % 1500 * 10)) \
    launchers/"$stage".py --recipe "$@" &
  wait_for $!

  if [ $code -ne 0 ]; then explain; fi
  if [ -f "$folder/$result" ]; then echo "$(date '+%F %T') complete: $folder"; exit 0; fi
  requeue "not finished"
}

# Say what went wrong, and leave with the exit code of the node that failed first. srun's own code is 137 or 143 where it had to end other nodes.
explain() {
  read -r node code < "$failed" 2> /dev/null || node=
  if [ -z "$node" ]; then echo "error: srun ended with exit code $code; its message is above, the nodes' logs are $logs/$start-*.log" >&2; exit "$code"; fi
  what="exit code $code"
  if [ "$code" -gt 192 ]; then what="a rank killed by signal $((256 - code)) (9: often for want of memory)"; fi # sys.exit(-9) of the launcher is 247
  if [ "$code" -eq 86 ]; then what="a hang, which the watchdog ended (stacks in $folder/hang/); submitted again, it goes on from the newest checkpoint"; fi
  echo "error: node $node failed first: $what. The end of $logs/$start-$node.log says:" >&2
  grep -ai error "$logs/$start-$node.log" | grep -av 'launch.py' | tail -n 5 >&2 || tail -n 3 "$logs/$start-$node.log" >&2
  exit "$code"
}
