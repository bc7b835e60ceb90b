#!/usr/bin/env bash
# The training step of pass and of PyTorch on one GPU, in turns, from prebuilt programs: no network, no cargo.
#
#   gpu.sh BIN PYTHON SHARD OUT [TEST]...
#
#   BIN      pass-host built with CUDA
#   PYTHON   a Python with torch
#   SHARD    images for the loader, as `pass-host pack` writes them
#   OUT      folder for the results: one JSON a measurement, result.json, table.md; metrics and report of the long run
#   TEST     prebuilt test programs (golden, operations); each is run, its output kept
#
# Doubles the batch until memory or time ends, for pass, PyTorch and PyTorch compiled; then times all three at the largest
# batch that pass and compiled PyTorch share, round by round, and pass once more with images from the shard, with crops by the
# processor and by the GPU. Then pass trains for some minutes from the shard, as fast as the better of these two.
#
# Environment, with defaults:
#   DEVICE=cuda PRECISION=bf16 ARCH=vit_small CLASS_PROTOTYPES=65536 PATCH_PROTOTYPES=4096
#   FIRST_BATCH=32 LAST_BATCH=1024   where the doubling begins and ends
#   ROUNDS=3 STEPS=10 WARMUP=3       rounds, steps timed and not timed in each
#   LIMIT=240                        seconds a measurement may take
#   MINUTES=25                       of the training run; 0 = none
#   THREADS=<all>                    compute threads of the host
# On the CPU, to try it: DEVICE=cpu PRECISION=f32 ARCH=vit_tiny CLASS_PROTOTYPES=256 PATCH_PROTOTYPES=256 FIRST_BATCH=1
#   LAST_BATCH=2 ROUNDS=1 STEPS=1 WARMUP=1 MINUTES=1
set -euo pipefail

[ $# -ge 4 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
BIN=$1 PYTHON=$2 SHARD=$3 OUT=$4
shift 4
HERE=$(cd "$(dirname "$0")" && pwd)
: "${DEVICE:=cuda}" "${PRECISION:=bf16}" "${ARCH:=vit_small}" "${CLASS_PROTOTYPES:=65536}" "${PATCH_PROTOTYPES:=4096}"
: "${FIRST_BATCH:=32}" "${LAST_BATCH:=1024}" "${ROUNDS:=3}" "${STEPS:=10}" "${WARMUP:=3}" "${LIMIT:=240}"
: "${THREADS:=$(nproc)}" "${MINUTES:=25}"
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT"/*.log "$OUT"/*.memory "$OUT"/training* "$OUT"/events.out.tfevents.*

say() { printf '%s  %s\n' "$(date +%T)" "$*" >&2; }

# measure NAME COMMAND...: JSON to NAME.json, messages to NAME.log, memory of the GPU five times a second to NAME.memory
measure() {
  local name=$1 watcher='' code=0
  shift
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 >"$OUT/$name.memory" 2>/dev/null &
    watcher=$!
  fi
  timeout "$LIMIT" "$@" >"$OUT/$name.json" 2>"$OUT/$name.log" || code=$?
  [ -z "$watcher" ] || { kill "$watcher"; wait "$watcher" 2>/dev/null || true; }
  [ "$code" = 0 ] || rm -f "$OUT/$name.json"
  say "$name: exit code $code"
  return "$code"
}

NETWORK=(--threads "$THREADS" --device "$DEVICE" --precision "$PRECISION" --set "model.arch=$ARCH" --set "augment.local_crops=2"
  --set "head.class_prototypes=$CLASS_PROTOTYPES" --set "head.patch_prototypes=$PATCH_PROTOTYPES")

# pass NAME BATCH STEPS WARMUP [IMAGES and FLAGS]
pass() {
  measure "$1" "$BIN" bench train "${@:5}" --batch "$2" --steps "$3" --warmup "$4" --json "${NETWORK[@]}"
}

# torch NAME BATCH STEPS WARMUP [--compile]
torch() {
  measure "$1" "$PYTHON" "$HERE/peer/step.py" --batch "$2" --steps "$3" --warmup "$4" --json --threads "$THREADS" \
    --device "$DEVICE" --precision "$PRECISION" --arch "$ARCH" --local-crops 2 \
    --class-prototypes "$CLASS_PROTOTYPES" --prototypes "$PATCH_PROTOTYPES" "${@:5}"
}
eager() { torch "$@"; }
compiled() { torch "$@" --compile; }

# largest WHO FIRST: the largest batch, doubled from FIRST, that WHO computes; 0 if not even that
largest() {
  local best=0 batch=$2
  while [ "$batch" -le "$LAST_BATCH" ] && "$1" "fit-$1-$batch" "$batch" 1 1; do
    best=$batch batch=$((2 * batch))
  done
  echo "$best"
}

for program in "$@"; do
  name=test-$(basename "$program")
  PASS_GOLDEN_DIR=${PASS_GOLDEN_DIR:-$HERE/../../fixtures/golden} "$program" >"$OUT/$name.log" 2>&1 && code=0 || code=$?
  printf '{"program": "%s", "exit_code": %s}\n' "$(basename "$program")" "$code" >"$OUT/$name.json"
  say "$name: exit code $code"
done
if command -v nvidia-smi >/dev/null; then nvidia-smi >"$OUT/nvidia-smi.log" 2>&1 || true; fi

ours=$(largest pass "$FIRST_BATCH")
theirs=$(largest eager "$FIRST_BATCH")
theirs_compiled=$(largest compiled "$((theirs > 0 ? theirs : FIRST_BATCH))")
say "largest batches: pass $ours, PyTorch $theirs, compiled $theirs_compiled"
printf '{"pass": %s, "eager": %s, "compiled": %s}\n' "$ours" "$theirs" "$theirs_compiled" >"$OUT/largest.json"

common=$((ours < theirs_compiled ? ours : theirs_compiled))
[ "$common" -gt 0 ] || common=$((ours > theirs ? ours : theirs))
[ "$common" -gt 0 ] || { say "nothing fits: see the logs in $OUT"; exit 1; }
for round in $(seq "$ROUNDS"); do
  for who in pass eager compiled; do
    "$who" "round-$round-$who-$common" "$common" "$STEPS" "$WARMUP" || true
  done
done
# each at its own largest batch, where that is another
[ "$ours" -le "$common" ] || pass "own-pass-$ours" "$ours" "$STEPS" "$WARMUP" || true
[ "$theirs_compiled" -le "$common" ] || compiled "own-compiled-$theirs_compiled" "$theirs_compiled" "$STEPS" "$WARMUP" || true
for crops in cpu gpu; do
  pass "shard-$crops-crops-$common" "$common" "$STEPS" "$WARMUP" "$SHARD" --augment "$crops" || true
done

# speed NAME: images a second of a measurement; 0 if it failed
speed() {
  [ -s "$OUT/$1.json" ] || { echo 0; return; }
  "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["images_per_s"])' "$OUT/$1.json"
}

# the schedules of a run stretch over its steps, so their number is chosen to fill the time
if [ "$MINUTES" -gt 0 ]; then
  by_cpu=$(speed "shard-cpu-crops-$common") by_gpu=$(speed "shard-gpu-crops-$common")
  read -r crops steps < <("$PYTHON" -c 'import sys
cpu, gpu, batch, minutes = map(float, sys.argv[1:])
print("gpu" if gpu > cpu else "cpu", int(0.9 * 60 * minutes * max(cpu, gpu) / batch))' "$by_cpu" "$by_gpu" "$common" "$MINUTES")
fi
if [ "${steps:-0}" -gt 0 ]; then
  run=$(mktemp -d)/run code=0
  say "training: $steps steps of $common images, crops by the $crops, about $MINUTES minutes"
  # past the time it is interrupted, which ends it in order
  timeout -s INT "$((60 * MINUTES))" "$BIN" train "$SHARD" --preset paper-vit-s16 --batch "$common" --steps "$steps" \
    --augment "$crops" --out "$run" --json "${NETWORK[@]}" --set "checkpoint.every_steps=$steps" --report-every "$((steps / 5 + 1))" \
    >"$OUT/training.out" 2>"$OUT/training.log" || code=$?
  say "training: exit code $code (124: interrupted at its time)"
  # the weights stay behind: gigabytes say less than the curves
  for kept in config.toml metrics.jsonl report.html quarantine.tsv non-finite.tsv; do
    [ ! -e "$run/$kept" ] || cp "$run/$kept" "$OUT/training-$kept"
  done
  cp "$run"/events.out.tfevents.* "$OUT/" 2>/dev/null || true
  rm -rf "$(dirname "$run")"
fi

"$PYTHON" "$HERE/peer/gpu_table.py" "$OUT"
