#!/usr/bin/env bash
# Track 1, CIFAR-100: ten random real images a class, refined, and scored by the official protocol in three rounds.
#
#     STEPS=4000 bash tools/recipes/cifar100_track1.sh [FOLDER]
#
# Everything lies in FOLDER (runs/track1). Stopped at any time, the same command resumes; with more STEPS it refines on.
# The log says how long a step takes. tools/results/refine.md has the recorded score.
set -euo pipefail
folder=${1:-runs/track1}
mkdir -p "$folder"
cd "$folder"
[ -f random/cifar100.pt ] || python -m ddkit generate --dataset cifar100 --from-real random --seed 0 --out random/cifar100.pt
python -m ddkit refine random/cifar100.pt --out refined/cifar100.pt --run refine --steps "${STEPS:-4000}"
python -m ddkit evaluate refined/cifar100.pt --rounds 3
sha256sum refined/cifar100.pt
