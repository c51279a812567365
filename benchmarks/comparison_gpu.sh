#!/usr/bin/env bash
# The controlled comparison from nothing to the result file: `data` where the shared data and reasoning-gym are, the rest on the GPU machine,
# with DATA carried there. Each stage can be run again: what is trained is kept, measuring goes on where it stopped. What is trained, asked
# and timed side by side within minutes: comparison_campaign.sh.
#     bash benchmarks/comparison_gpu.sh data DIR                 # training and held-out rows, 10 MB (REFUSION_SHARED says where from)
#     bash benchmarks/gpu_campaign.sh base                        # the base model, as for the default model
#     bash benchmarks/train_comparison.sh SEED STEPS              # all of them; DATA=DIR
#     bash benchmarks/comparison_gpu.sh measure [options]        # comparison.py, at most MINUTES; DATA=DIR
# WORK (scratch of the machine), OUT (what comes back). STATE: the folder `answers` of an earlier OUT, to go on from on another machine.
set -euo pipefail
source "$(dirname "$0")/gpu_name.sh"
WORK=${WORK:-/tmp/campaign}
DATA=${DATA:-$WORK/data} OUT=${OUT:-$WORK/out} PYTHON=${PYTHON:-python3}

data() { # DIR
    local shared=${REFUSION_SHARED:-../shared}
    mkdir -p "$1"
    export PYTHONPATH=src:${PYTHONPATH:-}
    $PYTHON benchmarks/prepare_data.py --shared "$shared" --output "$1/all" --functions 0
    # Half of the chat pairs: more are not seen once in as many steps as there is time for.
    mv "$1"/all/{predictable,gsm8k,tasks_heldout,heldout,selfwritten_train-00}.jsonl.gz "$1/"
    rm -r "$1/all"
    cp "$shared/data/gsm8k/test.jsonl.gz" "$1/gsm8k_test.jsonl.gz"
    $PYTHON benchmarks/reasoning_data.py --output "$1"
    du -sh "$1"
}

measure() { # options of comparison.py
    export REFUSION_HOME=${REFUSION_HOME:-$WORK/home} PYTHONPATH=src:$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1
    mkdir -p "$OUT/answers"
    [ -z "${STATE:-}" ] || cp -n "$STATE"/* "$OUT/answers/"
    $PYTHON benchmarks/comparison.py --runs "$WORK/runs/comparison" --data "$DATA" --device "${DEVICE:-cuda}" --state "$OUT/answers" \
        --output "$OUT/comparison-$GPU.json" --seconds "$((${MINUTES:-9} * 60))" "$@"
}

"$@"
