# shellcheck shell=bash
# What the batch scripts of this folder share. They source it in the project's root, where sbatch was called.
set -euo pipefail
asked=
trap 'asked=yes' USR1 TERM # in the first seconds: it would end this shell, and with it the job
[ $# -gt 0 ] || { echo "error: name a recipe: sbatch launchers/slurm/NAME.sbatch recipes/NAME.yaml [further arguments]" >&2; exit 2; }
export PATH=$PWD/.venv/bin:$PATH # where there is no .venv: the environment that was active when sbatch was called
unset SLURM_EXPORT_ENV           # srun would take it for its --export: with sbatch --export=NONE or --export=NAME its tasks lacked what is exported here

# A rank a GPU; on a cluster of CPUs RANKS_PER_NODE (sbatch --export=ALL,RANKS_PER_NODE=2 ...), by default one.
gpus=${SLURM_GPUS_ON_NODE:-0}
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || { echo "error: RANKS_PER_NODE=$ranks: must be a whole number from 1, or left out" >&2; exit 2; }
export RANKS_PER_NODE=$ranks # for node.sh

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
  trap '' USR1 TERM ALRM # SLURM's own, as soon as it takes the job back
  for _ in 1 2 3 4 5 6; do # its controller may be away for a moment
    if shown=$(scontrol show job -o "$job"); then
      if [[ $shown != *" JobState=RUNNING "* ]]; then exit 85; fi
      if scontrol requeue "$job"; then
        echo "$1: job $job goes back into the queue and goes on from there"
        exit 85 # whatever happens: never COMPLETED
      fi
    fi
    sleep 5
  done
  echo "error: $1, but SLURM did not take job $job back into the queue (its message is above): submit it again, it goes on from there" >&2
  exit 85
}

# wait_for PID: its exit code in `code`. A trap ends `wait`, which then did not see the end of the process.
wait_for() {
  asked=yes
  while [ "$asked" ]; do
    asked=
    wait "$1" && code=0 || code=$?
  done
}

# train STAGE RESULT RECIPE [ARGUMENTS...]: the whole job. RESULT is the file that the stage writes last, into the output folder.
train() {
  stage=$1 result=$2 && shift 2
  folder=$(python -m toolkit.recipe "$stage" "$@") # a mistake in it is one line, and exit code 2
  logs=$folder/logs start=$folder/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs"
  scontrol show hostnames | sed "s/$/ slots=$ranks/" > "$start.hosts"
  rm -f "$folder/STOP" "$start.failed" "$start.left" # STOP: of a start that was killed
  before=$(progress)

  echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $stage on $SLURM_NNODES nodes of $ranks ranks; logs in $start-*.log"
  # --cpu-bind=none: the launcher's ranks may use all cores that the job has on the node
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --output="$start-%N.log" bash launchers/slurm/node.sh "$start" \
    --hostfile "$start.hosts" --no_ssh --master_addr "$(scontrol show hostnames | head -n 1)" --master_port $((15000 + SLURM_JOB_ID % 1500 * 10)) \
    launchers/"$stage".py --recipe "$@" &
  step=$! alarm='' late=''
  # 180 s before the time limit (--signal), or sent by you: scancel --batch --signal=USR1 JOB
  trap ask USR1 TERM
  trap 'again "a validation or an export takes longer than the time that is left"' ALRM
  if [ "$asked" ]; then ask; fi # by a signal before this line
  wait_for "$step"
  trap '' USR1 TERM ALRM # nobody is left to be asked
  rm -f "$folder/STOP"
  if [ "$alarm" ]; then kill "$alarm" || true; fi

  if [ "$code" -ne 0 ] && [ "$code" -ne 85 ]; then explain; fi
  if [ "$code" -eq 85 ] || [ -e "$start.left" ]; then again "not finished"; fi
  if [ ! -f "$folder/$result" ]; then echo "error: $stage ended without $folder/$result; the nodes' logs are $start-*.log" >&2; exit 1; fi
  echo "$(date '+%F %T') complete: $folder"
  exit 0
}

# What has been saved: the name of the newest checkpoint, or the answers of an evaluation.
progress() { { cat "$folder/latest" "$folder/predictions.jsonl" 2> /dev/null || true; } | cksum; }

# again WHY: requeue, but not for ever. Two starts in a row that left because their time was up and had saved nothing are an error.
again() {
  if [ "$late" ] && [ "$before" = "$(progress)" ]; then
    idle=$logs/$SLURM_JOB_ID.idle # what had been saved when a start last saved nothing
    if [ "$before" = "$(cat "$idle" 2> /dev/null)" ]; then
      echo "error: nothing was saved within --time, at two starts in a row: give the job more time" >&2
      exit 1
    fi
    echo "$before" > "$idle" || true
  fi
  requeue "$1"
}

# Ask the ranks to save and to leave. They look between two steps: an evaluation has its answers on the disk anyway, and a validation or an export may take
# longer than the time that is left. SLURM does not requeue what the time limit ended, so that half a minute before it this script does it, answered or not.
# shellcheck disable=SC2329 # a trap calls it
ask() {
  asked=yes
  end=$(scontrol show job -o "$job" | sed -n 's/.* EndTime=\([0-9][^ ]*\) .*/\1/p') || end=
  left=$([ -z "$end" ] || echo $(($(date -d "$end" +%s) - $(date +%s) - 30)))
  if [ "$left" ] && [ "$left" -lt 270 ]; then late=yes; fi # --signal comes 180 s before the end, or up to 60 s earlier
  if [ "$stage" = evaluate ]; then again "answers are on the disk batch by batch"; fi
  touch "$folder/STOP" || echo "error: $folder/STOP cannot be written: the ranks are not asked to save" >&2
  if [ "$left" ] && [ "$left" -gt 0 ]; then
    (sleep "$left" && kill -ALRM $$) &
    alarm=$!
  fi
}

# Say what went wrong, and leave with the exit code of the node that failed first. srun's own code is 137 or 143 where it had to end other nodes.
explain() {
  if [ ! -s "$start.failed" ]; then echo "error: srun ended with exit code $code; its message is above, the nodes' logs are $start-*.log" >&2; exit "$code"; fi
  read -r node code < "$start.failed"
  what="exit code $code"
  if [ "$code" -gt 192 ]; then what="a rank killed by signal $((256 - code)) (9: often for want of memory)"; fi # sys.exit(-9) of the launcher is 247
  if [ "$code" -eq 86 ] && [ -f "$folder/hang/verdict.txt" ]; then
    cat "$folder/hang/verdict.txt" >&2
    what="a hang, which the watchdog ended; submitted again, it goes on from the newest checkpoint, if there is one"
  fi
  echo "error: node $node failed first: $what. The end of $start-$node.log says:" >&2
  grep -ai error "$start-$node.log" | grep -av 'launch.py' | tail -n 5 >&2 || tail -n 3 "$start-$node.log" >&2 || true # the code below counts
  exit "$code"
}
