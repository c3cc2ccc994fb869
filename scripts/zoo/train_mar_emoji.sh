#!/bin/bash
# Trains the zoo's mar-emoji: a MAR on the latents of far-emoji's VAE. 40 minutes of one idle core with AMX.
set -euo pipefail
source "$(dirname "$0")/training_run.sh"
prepare
encode "$far_vae" "$runs/latents"

train mar "$runs/mar" --data "$runs/latents" --vae "$far_vae" --steps "${STEPS:-6400}" \
    --width 192 --depth 4 --heads 4 --buffer 8 --head-width 256 --head-depth 3 --prediction v \
    --mask-least 0.3 --input-noise 0.3 --draws 2 --dropout 0 --flip 0 --sheet-iterations 16 --sheet-steps 10 \
    --batch 32 --lr 1e-3 --ema 0.999

python scripts/zoo/model_card.py --vae "$far_vae" --run "$runs/mar" --data data/emoji --extra data/emoji-all \
    --settings "iterations=64 steps=10 guidance=6 temperature=0.7" --recipe scripts/zoo/train_mar_emoji.sh -o models/zoo/mar-emoji
