#!/usr/bin/env bash
# The paper's benchmarks on a GPU machine without network, in bounded time; each stage can be run again and goes on where it stopped.
#     bash benchmarks/suite_wheels.sh .carry/suite                 # here; carry DIR=.carry/suite along with the checkout
#     bash benchmarks/suite_gpu.sh install                        # there: the wheels into $WORK/site
#     bash benchmarks/suite_gpu.sh run base same paper one        # any of these, at most SECONDS_EACH each, JOBS at a time
# base: the base model, autoregressive · same: our weights, autoregressive · paper: ReFusion with the paper's settings per task · one: ReFusion
# with one setting for all. GSM8K, ARC-Challenge, HumanEval and MBPP are run whole; of MMLU-Pro and MATH the first LIMIT questions, their
# subjects in turn, or LIMIT=all. PARTS=part asks only those two. BATCH questions are decoded together (256 suit a large GPU).
# OUT gets suite-NAME-whole-$GPU.json and suite-NAME-part-$GPU.json where a run is finished, and suite-answers.tgz in any case: unpacked
# into $WORK/suite on another machine (STATE=suite-answers.tgz), the same command goes on there. With JOBS above 1 the tokens/s in the result
# files are those of a shared GPU; the tables show tokens per forward. A run's KV cache takes a third of an 80 GB card, twice that at
# BATCH=256.
# GPQA is left out where DIR/data/gpqa has no rows of its authors. MADE_UP_GPQA=1 asks made-up questions in its layout besides, to show that
# the task runs: suite-NAME-gpqa-made-up-$GPU.json, whose score is not GPQA's. `made_up NAMES` does only that.
set -euo pipefail
source "$(dirname "$0")/gpu_name.sh"
WORK=${WORK:-/tmp/campaign} DIR=${DIR:-.carry/suite} OUT=${OUT:-$WORK/out} PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-1400} SECONDS_EACH=${SECONDS_EACH:-400} JOBS=${JOBS:-1} PARTS=${PARTS:-whole part} BATCH=${BATCH:-}
MODEL=${MODEL:-smollm2-135m-refusion} BASE=${BASE:-smollm2-135m}
export REFUSION_HOME=${REFUSION_HOME:-$WORK/home} PYTHONPATH=src:$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
mkdir -p "$WORK/suite" "$OUT"

install() {
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" "$DIR"/wheels/*.whl
    $PYTHON -c "import lm_eval.api.task, math_verify, datasets; print('lm-eval is there')"
}

made_up() { # NAMES
    PARTS=made-up MADE_UP_GPQA=1 run "$@"
}

run() { # NAMES
    [ -z "${MADE_UP_GPQA:-}" ] || $PYTHON benchmarks/made_up_gpqa.py "$WORK/made-up"
    [ -z "${STATE:-}" ] || tar -xzf "$STATE" -C "$WORK/suite"
    for name in "$@"; do
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        run_one "$name" &
    done
    wait
    tar -czf "$OUT/suite-answers.tgz" -C "$WORK/suite" . || [ $? -eq 1 ]  # 1: another run beside us was writing
    for file in "$WORK"/suite/*.json; do [ ! -e "$file" ] || cp "$file" "$OUT/$(basename "$file" .json)-$GPU.json"; done
}

run_one() { # NAME
    local began=$SECONDS limit=()
    [ "$LIMIT" = all ] || limit=(--limit "$LIMIT")
    [ -z "${MADE_UP_GPQA:-}" ] || evaluate "$1" gpqa-made-up --tasks gpqa ${WHOLE_LIMIT:+--limit "$WHOLE_LIMIT"} ||
        echo "$1: made-up GPQA is not finished" >&2
    for part in $PARTS; do
        case $part in
            whole) evaluate "$1" whole --tasks gsm8k,arc_challenge,humaneval,mbpp,gpqa ${WHOLE_LIMIT:+--limit "$WHOLE_LIMIT"} ;;
            part) evaluate "$1" part --tasks mmlu_pro,math ${limit[@]+"${limit[@]}"} ;;
        esac || { echo "$1 is not finished; the same command goes on" >&2; return 0; }
    done
}

evaluate() { # NAME PART [options]
    local name=$1 output="$WORK/suite/suite-$1-$2.json" data="$DIR/data" how
    [ "$2" != gpqa-made-up ] || data="$WORK/made-up"
    shift 2
    [ ! -e "$output" ] || { echo "$output is finished" >&2; return 0; }
    case $name in
        base) how="--model $BASE --decoder autoregressive" ;;
        same) how="--model $MODEL --decoder autoregressive" ;;
        paper) how="--model $MODEL --setting paper" ;;
        one) how="--model $MODEL --setting one" ;;
        *) echo "unknown run $name; it must be base, same, paper or one" >&2; exit 2 ;;
    esac
    local left=$((SECONDS_EACH - (SECONDS - began)))
    [ "$left" -gt 0 ] || return 1
    # shellcheck disable=SC2086 # several words
    timeout -s INT -k 20 "$left" env --default-signal=INT $PYTHON -m refusion eval --suite paper --data "$data" --device "$DEVICE" $how \
        ${BATCH:+--batch-size "$BATCH"} --resume --output "$output" "$@"
}

"$@"
