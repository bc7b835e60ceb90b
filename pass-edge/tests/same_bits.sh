#!/usr/bin/env bash
# The same bits everywhere, for models too large for the tests: features of photos with every kernel of this machine and
# one and two threads, and on emulated aarch64 processors without dot products, with them, and with 8-bit matrix products.
#
#   pass-edge/tests/same_bits.sh FOLDER MODEL.pass…    as many of the folder's images as PHOTOS says (20)
#   EMULATED=5 …       fewer images in the emulator, which takes seconds for each
#   THREADS="1 2" …    these numbers of threads in the emulator (1)
#   CROSS_PREFIX=DIR   where tests/cross/setup.sh put the toolchain; without it this machine alone
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/../.."
photos=$1; shift
count=${PHOTOS:-20} emulated=${EMULATED:-${PHOTOS:-20}}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

cargo build --release --locked -p pass-edge --features program
native=target/release/pass-edge arm=
if [ -n "${CROSS_PREFIX:-}" ]; then
  ( . "$CROSS_PREFIX/env.sh"
    cargo build --release --locked -p pass-edge --features program --target aarch64-unknown-linux-gnu )
  arm=${CROSS_TARGET_DIR:-target/cross}/aarch64-unknown-linux-gnu/release/pass-edge
fi

# every n-th image, so that all parts of the folder are seen
mapfile -t all < <(find "$photos" -type f \( -name '*.jpg' -o -name '*.jpeg' -o -name '*.png' \) | LC_ALL=C sort)
[ "${#all[@]}" -ge "$count" ] || { echo "$photos: expected $count images, found ${#all[@]}" >&2; exit 2; }
images=()
for ((i = 0; i < count; i++)); do images+=("${all[$((i * ${#all[@]} / count))]}"); done

failed=0
features() { # REFERENCE IMAGES COMMAND…: features of the first images, compared with the reference
  local reference=$1 number=$2 start; shift 2
  start=$(date +%s)
  "$@" "${images[@]:0:number}" --strict --out "$work/f.npy" > "$work/messages" 2>&1 || { cat "$work/messages" >&2; exit 1; }
  local sum; sum=$(sha256sum < "$work/f.npy" | cut -c1-16)
  if [ ! -e "$reference.$number" ]; then echo "$sum" > "$reference.$number"; fi
  local verdict=same
  [ "$sum" = "$(cat "$reference.$number")" ] || { verdict=DIFFERENT; failed=1; }
  printf '%-9s %s  %3d images %5d s  %s\n' "$verdict" "$sum" "$number" $(($(date +%s) - start)) "${label:-}"
}

for model in "$@"; do
  reference=$work/$(basename "$model")
  echo "== $model ($("$native" info "$model" | sed -n 's/^mode *//p'))"
  kernels=$("$native" info "$model" | sed -n 's/^kernel .*; here: //p')
  for kernel in $kernels; do
    for threads in 1 2; do
      label="$kernel, $threads threads" features "$reference" "$count" \
        "$native" features "$model" --kernel "$kernel" --threads "$threads"
    done
  done
  [ -n "$arm" ] || continue
  if [ "$emulated" != "$count" ]; then
    label="the reference of the emulated" features "$reference" "$emulated" "$native" features "$model"
  fi
  for cpu in cortex-a57 cortex-a76 max; do
    kernel=$(QEMU_CPU=$cpu "$CROSS_PREFIX/bin/qemu-aarch64" "$arm" info "$model" | sed -n 's/^kernel *\([^;]*\);.*/\1/p')
    for threads in ${THREADS:-1}; do
      label="$cpu, $kernel, $threads threads" features "$reference" "$emulated" \
        env QEMU_CPU=$cpu "$CROSS_PREFIX/bin/qemu-aarch64" "$arm" features "$model" --threads "$threads"
    done
  done
done
exit $failed
