#!/bin/sh
# Smoke test at the end of the image build: make a tokenizer and shards from the bundled sample and train three steps.
#
#   Usage   sh launch/smoke.sh     (in the image, or in a folder with `job` and `configs`; it deletes its files)
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1

job() {
    command=$1
    shift
    python -m job "$command" --config configs/demo.yaml \
        --data.source job/demo/sample.jsonl --data.shards "$folder/shards" --data.cache_dir "$folder/cache" --data.processes 1 \
        --tokenizer.source "$folder/tokenizer" --run.output "$folder/run" "$@"
}

job tokenizer
job prepare
job train --train.processes 1 --train.max_steps 3 --train.warmup_steps 1 --train.log_every 1 \
    --tracking.mode disabled --generate.max_new_tokens 4
test -s "$folder/run/final/model.safetensors"
