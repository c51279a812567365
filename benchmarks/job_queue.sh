#!/usr/bin/env bash
# A queue of jobs on the GPUs of one machine, run in the background of a lease: who is free takes the next job.
#     setsid nohup bash benchmarks/job_queue.sh JOBS_FILE GPU... > /dev/null 2>&1 &
#     touch $WORK/queue/NAME.ended                                # what was done outside of the queue counts as ended too
# One worker a GPU; a GPU named twice takes two jobs at a time. A line of JOBS_FILE is a job, the first ones first, # begins a comment:
#     NAME [after=NAME,...] [alone] | COMMAND
# after: not before these have ended, well or not. alone: nothing else of the queue runs on its GPU meanwhile. COMMAND is run by bash in the
# folder the queue was started in, with CUDA_VISIBLE_DEVICES set, and bounds its own time. The file is read anew for every job, so lines may
# be added while it runs. Another call joins the queue with further GPUs or, with the same $WORK, another file. A worker ends when every job of
# its file has begun. $WORK/logs/NAME.log has a job's output, $WORK/logs/queue.log when each began and ended, its exit code and seconds.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11p' "$0" >&2; exit 2; }
WORK=${WORK:-/tmp/campaign} jobs_file=$1; shift
queue=$WORK/queue logs=$WORK/logs
mkdir -p "$queue" "$logs"

worker() { # GPU
    local gpu=$1 taken name how command
    while :; do
        # A job is taken once the GPU is free for it, and its gate shut until it has the GPU: nobody overtakes one that waits to be alone.
        exec 7> "$queue/gate-$gpu" 8> "$queue/gpu-$gpu"
        flock 7
        flock -s 8
        taken=$(take)
        case $taken in
            none) return ;;
            wait) exec 7>&- 8>&-; sleep 1; continue ;;
        esac
        IFS=$'\t' read -r name how command <<< "$taken"
        [ "$how" != alone ] || flock -x 8
        exec 7>&-
        run "$gpu" "$name" "$command"
        exec 8>&-
    done
}

take() { # the next job that may begin, marked as begun: NAME, `alone` or `beside`, COMMAND; or `wait`; or `none` where all have begun
    exec 9> "$queue/lock"
    flock 9
    local found=none line name words after command how
    while IFS= read -r line || [ -n "$line" ]; do
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9._-]+)[[:space:]]*([^|]*)\|[[:space:]]*(.+)$ ]] || { refuse "$line"; continue; }
        name=${BASH_REMATCH[1]} words=" ${BASH_REMATCH[2]} " command=${BASH_REMATCH[3]} how=beside after=
        [ ! -e "$queue/$name.begun" ] || continue
        # What is not understood must not begin: a misspelt `after` would run too early, a misspelt `alone` beside others.
        [[ $words =~ ^([[:space:]]+(alone|after=[A-Za-z0-9._,-]+))*[[:space:]]+$ ]] || { refuse "$line"; continue; }
        [[ ! $words =~ [[:space:]]alone[[:space:]] ]] || how=alone
        [[ ! $words =~ after=([^[:space:]]+) ]] || after=${BASH_REMATCH[1]}
        if have_ended "${after//,/ }"; then
            touch "$queue/$name.begun"
            printf '%s\t%s\t%s\n' "$name" "$how" "$command"
            return
        fi
        found='wait'
    done < "$jobs_file"
    echo "$found"
}

have_ended() { # "NAME ..."
    local name
    for name in $1; do [ -e "$queue/$name.ended" ] || return 1; done
}

run() { # GPU NAME COMMAND
    local began=$SECONDS code=0
    say "GPU $1: $2 begins"
    CUDA_VISIBLE_DEVICES=$1 bash -c "$3" >> "$logs/$2.log" 2>&1 7>&- 8>&- < /dev/null || code=$?
    say "GPU $1: $2 ended with $code after $((SECONDS - began)) s"
    touch "$queue/$2.ended"
}

refuse() { # LINE: told once
    grep -qsxF -- "$1" "$queue/refused" || { echo "$1" >> "$queue/refused"; say "not a job: $1"; }
}

say() { echo "$(date +%T) $*" >> "$logs/queue.log"; }

for gpu in "$@"; do worker "$gpu" & done
wait
