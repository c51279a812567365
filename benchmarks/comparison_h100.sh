#!/usr/bin/env bash
# The controlled comparison from nothing to the result file. The first stage runs where the shared data and reasoning-gym are, the others on
# the GPU machine, with DATA carried there. Each stage can be run again: trained models are kept, measuring goes on where it stopped.
#     bash benchmarks/comparison_h100.sh data DIR                # training and held-out rows, a few MB (REFUSION_SHARED says where from)
#     bash benchmarks/gpu_campaign.sh base                       # the base model, as for the default model
#     bash benchmarks/comparison_h100.sh train OBJECTIVE SEED    # one of refusion autoregressive masked_diffusion block_diffusion
#     bash benchmarks/comparison_h100.sh train_all               # SEEDS x OBJECTIVES, by default "0" x all four
#     bash benchmarks/comparison_h100.sh measure [options]       # comparison.py with the answers so far; MINUTES bounds it
# WORK (scratch of the machine), DATA (rows), OUT (what comes back), PASSES over the rows, RECIPE_SET (further --set of every training).
set -euo pipefail
WORK=${WORK:-/tmp/campaign} DATA=${DATA:-.carry/comparison} OUT=${OUT:-$WORK/out}
SEEDS=${SEEDS:-0} OBJECTIVES=${OBJECTIVES:-autoregressive refusion block_diffusion masked_diffusion} PYTHON=${PYTHON:-python3}
export PYTHONPATH=src:$WORK/site PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
[ "${1:-}" = data ] || export REFUSION_HOME=${REFUSION_HOME:-$WORK/home}  # where `gpu_campaign.sh base` puts the base
mkdir -p "$WORK/logs" "$OUT"

data() { # DIR
    local shared=${REFUSION_SHARED:-../shared}
    mkdir -p "$1"
    $PYTHON benchmarks/prepare_data.py --shared "$shared" --output "$1/all" --functions 0
    mv "$1"/all/{predictable,gsm8k,tasks_heldout,heldout}.jsonl.gz "$1/"
    cat "$1"/all/selfwritten_train-*.jsonl.gz > "$1/chat.jsonl.gz"
    cp "$shared/data/gsm8k/test.jsonl.gz" "$1/gsm8k_test.jsonl.gz"
    rm -r "$1/all"
    $PYTHON benchmarks/reasoning_data.py --output "$1"
    ls -l "$1"
}

train() { # OBJECTIVE SEED
    local name=$1-$2
    [ ! -e "$WORK/runs/comparison/$name/final/config.json" ] || { echo "$name is trained already" >&2; return; }
    local sources="[{path=\"$DATA/predictable.jsonl.gz\"},{path=\"$DATA/gsm8k.jsonl.gz\"},"
    for family in chain_sum gcd letter_counting spell_backward; do sources+="{path=\"$DATA/rg_$family.jsonl.gz\"},"; done
    sources+="{path=\"$DATA/chat.jsonl.gz\",weight=${CHAT:-1.0}}]"
    # shellcheck disable=SC2086 # RECIPE_SET holds several words
    $PYTHON -m refusion train recipes/smollm2-135m-comparison.toml --output "$WORK/runs/comparison/$name" --json \
        --set "objective.name=\"$1\"" --set "run.seed=$2" --set "run.epochs=${PASSES:-2}" --set "data.sources=$sources" \
        --set "data.exclude=[\"$DATA/tasks_heldout.jsonl.gz\",\"$DATA/rg_heldout.jsonl.gz\",\"$DATA/heldout.jsonl.gz\"]" ${RECIPE_SET:-} \
        > "$WORK/logs/train-$name.json" 2> >(tee "$WORK/logs/train-$name.log" | tail -n 2 >&2)
    cp "$WORK/logs/train-$name.json" "$WORK/runs/comparison/$name/train.json"
    tar -czf "$OUT/comparison-logs.tgz" -C "$WORK" logs
}

train_all() {
    for seed in $SEEDS; do for objective in $OBJECTIVES; do train "$objective" "$seed"; done; done
}

measure() { # options of comparison.py
    # One folder for the answers: it comes back with $OUT and can be carried to the next machine as STATE.
    mkdir -p "$OUT/answers"
    [ -z "${STATE:-}" ] || cp -n "$STATE"/* "$OUT/answers/"
    $PYTHON benchmarks/comparison.py --runs "$WORK/runs/comparison" --data "$DATA" --device "${DEVICE:-cuda}" --state "$OUT/answers" \
        --output "$OUT/comparison-h100.json" --seconds "$((${MINUTES:-9} * 60))" "$@"
}

"$@"
