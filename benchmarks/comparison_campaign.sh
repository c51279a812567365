#!/usr/bin/env bash
# Controlled comparison, ablations and the seven benchmarks on one GPU, in stages of bounded time. From the checkout, DATA and SUITE beside it:
#     bash benchmarks/comparison_campaign.sh prepare                     # wheels of .whl, base model (REFUSION_GGUF), default model
#     bash benchmarks/comparison_campaign.sh train STEPS SEED...         # five recipes a seed (or RECIPE-SEED alone), JOBS at a time
#     bash benchmarks/comparison_campaign.sh ask SEED...                 # right answers, agreement, likelihood: several processes at once
#     bash benchmarks/comparison_campaign.sh speed SEED...               # tokens/s, alone on the GPU, and $RESULT-$GPU.json of these seeds
#     bash benchmarks/comparison_campaign.sh figures                     # $RESULT-$GPU.json of all seeds, from what was asked and timed
#     bash benchmarks/comparison_campaign.sh ablate SEED [ARM...]        # one setting at a time on the model of this seed and recipe ABLATED
#     bash benchmarks/comparison_campaign.sh recipes [ARM...]            # recipe_ablations.py, JOBS trainings at a time
#     bash benchmarks/comparison_campaign.sh suite                       # seven benchmarks with base and default model
#     bash benchmarks/comparison_campaign.sh all STEPS SEED...           # train, ask, speed, ablate, suite
# ASKED="refusion autoregressive" asks those contenders only. GPUS=2 shares the trainings and questions among two; speed and ablate take
# the first one (or the one in CUDA_VISIBLE_DEVICES). On several GPUs the stages can also be jobs of job_queue.sh, each with its own OUT: they
# share $WORK, and RESULT and ABLATIONS name what each one writes.
# Every stage ends after its seconds (TRAIN_S, ASK_S, SPEED_S, ABLATE_S, RECIPES_S, SUITE_S) and goes on where it stopped if it is run again,
# as long as $WORK is there: trainings from their checkpoints, everything else answer by answer. `all` goes on to the next stage either way.
# What comes back lies in $OUT: $RESULT-$GPU.json, $ABLATIONS-$GPU.json, ablations-plain-$GPU.json, recipe-ablations-$GPU.json, state.tgz
# (answers, logs, training reports) and suite-answers.tgz (result files of the seven benchmarks and their answers, from which STATE goes on on
# another machine).
set -euo pipefail
source "$(dirname "$0")/gpu_name.sh"
export WORK=${WORK:-/tmp/campaign} DATA=${DATA:-.carry/comparison} SUITE=${SUITE:-.carry/suite} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$WORK/out} REFUSION_HOME=${REFUSION_HOME:-$WORK/home} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor}
export PYTHONPATH=src:$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1
[ ! -d "$WORK/gguf" ] || export REFUSION_GGUF=$WORK/gguf
GPUS=${GPUS:-1} JOBS=${JOBS:-2} ABLATED=${ABLATED:-refusion} ASK_JOBS=${ASK_JOBS:-3} SUITE_JOBS=${SUITE_JOBS:-2} BASE=${BASE:-smollm2-135m}
TRAIN_S=${TRAIN_S:-300} ASK_S=${ASK_S:-120} SPEED_S=${SPEED_S:-90} ABLATE_S=${ABLATE_S:-100} SUITE_S=${SUITE_S:-160}
RECIPES_S=${RECIPES_S:-280} RESULT=${RESULT:-comparison} ABLATIONS=${ABLATIONS:-ablations}
# What a small machine needs otherwise, such as a dry run on a CPU: further options of each script.
TRAIN_OPTIONS=${TRAIN_OPTIONS:-} ASK_OPTIONS=${ASK_OPTIONS:-} SPEED_OPTIONS=${SPEED_OPTIONS:-} ABLATE_OPTIONS=${ABLATE_OPTIONS:-}
RECIPES_OPTIONS=${RECIPES_OPTIONS:-}
COMMON_SLOTS="--slot-size 16 --block-size 16 --slot-threshold 0.9 --token-threshold 0.4 --acceptance argmax --correction autoregressive
    --alternatives 2 --infill-length 6"
state=$WORK/state
mkdir -p "$OUT" "$WORK/logs" "$WORK/reports" "$state"

prepare() {
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" .whl/*.whl
    $PYTHON -m refusion models pull "$BASE"
    $PYTHON -m refusion models pull smollm2-135m-refusion
}

train() { # STEPS SEED|RECIPE-SEED...: the yardstick and ReFusion first; a seed after the other
    local steps=$1 ends=$((SECONDS + TRAIN_S)) names=(); shift
    for seed in "$@"; do
        case $seed in
            *-*) names+=("$seed") ;;
            *) for recipe in autoregressive refusion_few refusion block_diffusion masked_diffusion; do names+=("$recipe-$seed"); done ;;
        esac
    done
    pool "$JOBS" train_one "${names[@]}"
}

train_one() { # RECIPE-SEED; what runs out of time saves a checkpoint
    local recipe=${1%-*} seed=${1##*-}
    [ "$(left)" -gt 0 ] || return 0
    # A shell's background jobs ignore INT, so it is switched on again. shellcheck disable=SC2086 # options are several words
    OUT=$WORK/reports limited "$1" timeout -s INT -k 30 "$(left)" env --default-signal=INT \
        bash benchmarks/train_comparison.sh "$seed" "$steps" --only "$recipe" $TRAIN_OPTIONS
}

ask() { # SEED...
    local ends=$((SECONDS + ASK_S)) seeds="$*"
    local asked=(refusion_few refusion autoregressive "masked_diffusion masked_diffusion_fast" "refusion_one_by_one block_diffusion"
        "refusion_sliding refusion_few_sliding" refusion_paper plain)
    # shellcheck disable=SC2206 # names are words
    [ -z "${ASKED:-}" ] || asked=($ASKED)
    pool "$ASK_JOBS" ask_one "${asked[@]}"
    # shellcheck disable=SC2086
    limited result comparison --seeds $seeds --speed-only --batch-sizes --output "$WORK/$RESULT.json" $ASK_OPTIONS
}

ask_one() { # CONTENDERS, or the ablations that are not timed
    [ "$(left)" -gt 0 ] || return 0
    # shellcheck disable=SC2086
    if [ "$1" = plain ]; then
        limited ablations-plain $PYTHON benchmarks/ablations.py --model "$WORK/runs/comparison/$ABLATED-${seeds%% *}/final" --device "$DEVICE" \
            --base "$BASE" --groups kv score --arms 'kv: *0.9' 'score: *0.9' '*' --chat-rows 0 --limit 280 --batch-size 140 --seconds "$(left)" \
            --output "$WORK/ablations-plain.json" $COMMON_SLOTS $ABLATE_OPTIONS
        return
    fi
    limited "ask-${1// /-}" comparison --contenders $1 --seeds $seeds --batch-sizes --seconds "$(left)" --output "$WORK/${1// /-}.json" \
        $ASK_OPTIONS
}

speed() { # SEED...
    local ends=$((SECONDS + SPEED_S))
    # shellcheck disable=SC2086
    limited speed comparison --seeds "$@" --speed-only --seconds "$(left)" --output "$WORK/$RESULT.json" $ASK_OPTIONS $SPEED_OPTIONS
}

figures() {
    # shellcheck disable=SC2086
    limited result comparison --speed-only --seconds 0 --output "$WORK/$RESULT.json" $ASK_OPTIONS $SPEED_OPTIONS
}

comparison() { # options; what was asked already is not asked again
    $PYTHON benchmarks/comparison.py --runs "$WORK/runs/comparison" --data "$DATA" --device "$DEVICE" --base "$BASE" --state "$state/answers" \
        --speed-prompts 28 --slow-prompts 4 --speed-seconds 2 --likelihood-rows 96 "$@"
}

ablate() { # SEED [ARM...]
    local ends=$((SECONDS + ABLATE_S)) seed=$1 arms=('slots: common' 'slots: 4 in 32' 'slots: 8 in 32' 'slots: 16 in 32'
        'slots: 32 in 32' 'slots: 16 in 128' 'slots: 32 in 128' 'slots: 16 sliding' 'rules: *' 'infill: [01] alternatives'
        'infill: 2 behind*' 'fusion: two-pass' 'thresholds: slot 0.5' 'thresholds: token 0.1' 'thresholds: token 0.8' '*'); shift
    [ $# = 0 ] || arms=("$@")
    # shellcheck disable=SC2086
    limited "$ABLATIONS" $PYTHON benchmarks/ablations.py --model "$WORK/runs/comparison/$ABLATED-$seed/final" --device "$DEVICE" --base "$BASE" \
        --chat-data "$DATA/heldout.jsonl.gz" --chat-rows 64 --limit 280 --speed-prompts 7 --seconds "$(left)" --output "$WORK/$ABLATIONS.json" \
        --groups slots thresholds rules fusion infill --arms "${arms[@]}" $COMMON_SLOTS $ABLATE_OPTIONS
}

recipes() { # [ARM...]
    [ $# -gt 0 ] || set -- '*'
    # shellcheck disable=SC2086
    limited recipes $PYTHON benchmarks/recipe_ablations.py --device "$DEVICE" --train "$DATA/selfwritten_train-00.jsonl.gz" \
        --data "$DATA/heldout.jsonl.gz" --rows 256:384 --max-tokens 160 --batch-size 64 --steps 150 --jobs "$JOBS" --apart 2 \
        --seconds "$RECIPES_S" --work "$WORK/recipes" --output "$WORK/recipe-ablations.json" --arms "$@" $RECIPES_OPTIONS
}

suite() {
    export DIR=$SUITE JOBS=$SUITE_JOBS LIMIT=${LIMIT:-280}
    bash benchmarks/suite_gpu.sh install
    SECONDS_EACH=$SUITE_S OUT=$WORK/suite-out bash benchmarks/suite_gpu.sh run paper base one same
    cp "$WORK/suite-out/suite-answers.tgz" "$OUT/"
}

all() { # STEPS SEED...
    local steps=$1; shift
    for stage in "train $steps $*" "ask $*" "speed $*" "ablate $1" suite; do
        # shellcheck disable=SC2086
        stage $stage
    done
}

stage() { # NAME [arguments]: how long it took, and everything there is into $OUT
    local began=$SECONDS
    "$@" || echo "$1 failed; see $WORK/logs" >&2
    echo "$1: $((SECONDS - began)) s" | tee -a "$WORK/logs/stages.log" >&2
    for name in "$RESULT" "$ABLATIONS" ablations-plain recipe-ablations; do
        [ ! -e "$WORK/$name.json" ] || cp "$WORK/$name.json" "$OUT/$name-$GPU.json"
    done
    tar -czf "$OUT/state.tgz" --exclude='.*' -C "$WORK" logs state reports || [ $? -eq 1 ]  # 1: somebody beside us was writing a log
}

pool() { # JOBS FUNCTION ARGUMENT...: a call per argument, so many at a time, on GPUs 0 to GPUS - 1 in turn
    local jobs=$1 function=$2 nth=0; shift 2
    for argument in "$@"; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
        [ "$GPUS" = 1 ] || local -x CUDA_VISIBLE_DEVICES=$((nth++ % GPUS))
        "$function" "$argument" &
    done
    wait
}

limited() { # LOG COMMAND...: its output into a log, the last lines of it here
    local name=$1 code=0; shift
    "$@" >> "$WORK/logs/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || echo "$name ended with $code" >&2
    tail -n 2 "$WORK/logs/$name.log" >&2
}

left() { # seconds of this stage
    echo $((ends > SECONDS ? ends - SECONDS : 0))
}

case ${1:-} in
    prepare | train | ask | speed | figures | ablate | recipes | suite) stage "$@" ;;
    all) "$@" ;;
    *) sed -n '2,13p' "$0" >&2; exit 2 ;;
esac
