#!/bin/bash
# The two hybrids of FAR's article, VAR's scales with continuous tokens: residual and plain. They draw sample sheets, in
# runs/hybrid-residual and runs/hybrid-plain, and are not exported. Ten minutes of one idle core each.
set -euo pipefail
source "$(dirname "$0")/training_run.sh"
prepare
encode "$far_vae" "$runs/latents"
for kind in residual plain; do
    switch=--residual
    [ $kind = plain ] && switch=--no-residual
    train var "$runs/hybrid-$kind" --tokens continuous $switch --data "$runs/latents" --vae "$far_vae" --scales 1,2,4,8 \
        --steps "${STEPS:-2000}" --width 192 --depth 4 --heads 4 --head-width 192 --head-depth 3 --prediction v --draws 2 \
        --input-noise 0.2 --drop-path 0 --flip 0 --batch 32 --lr 1e-3 --ema 0.999 --sheet-steps 10
done
