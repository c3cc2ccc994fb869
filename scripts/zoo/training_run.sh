# For the recipes of the zoo (source it): folders, latents, and `train COMMAND FOLDER OPTIONS...`, which goes on with a run that
# was interrupted and leaves a finished one alone. RUNS: where runs lie. THREADS: of a run.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
runs=${RUNS:-runs}
far_vae=models/zoo/far-emoji/vae.safetensors
export OMP_NUM_THREADS=${THREADS:-1} ACCELERATE_USE_CPU=true

train() {
    local command=$1 folder=$2 resume=()
    shift 2
    [ -e "$folder/done" ] && return
    [ -e "$folder/checkpoint-last.pth" ] && resume=(--resume)
    far train "$command" -o "$folder" --threads "${THREADS:-1}" --amp auto --seed 0 --sheet-minutes 1000 \
        --schedule cosine --warmup 100 --clip 1 "${resume[@]}" "$@"
    touch "$folder/done"
}

prepare() {  # the pictures that all systems of the zoo are trained on
    [ -e data/emoji ] || python scripts/zoo/prepare_emoji.py -o data/emoji --size 64 --concepts 256 --holdout 2
    [ -e data/emoji-all ] || python scripts/zoo/prepare_emoji.py -o data/emoji-all --size 64 --concepts all --holdout 2
}

encode() {  # VAE FOLDER: their latents or tokens
    [ -e "$2" ] || far train cache-latents --data data/emoji --vae "$1" -o "$2" --threads "${THREADS:-1}"
}
