#!/usr/bin/env bash
# Every check by name; people and CI run the same lines.
#
#   tests/ci.sh                 the names
#   tests/ci.sh fmt clippy …    these checks, in this order
#   tests/ci.sh all             what .ci/run runs
set -euo pipefail
cd "$(dirname "$0")/.."

CROSS=${CROSS_PREFIX:-$HOME/.cache/pass-cross}
CUDA=${CUDA_PREFIX:-$HOME/.cache/pass-cuda}

title() { printf '\n== %s\n' "$*"; }
skip() { printf 'SKIPPED: %s\n' "$*"; exit 0; }

check_fmt() { # formatting
  cargo fmt --all --check
}

check_clippy() { # lints, warnings denied
  cargo clippy --workspace --all-targets --locked -- -D warnings
  cargo clippy -p pass-core --all-targets --all-features --locked -- -D warnings
  cargo clippy -p pass-edge --all-targets --locked -- -D warnings
  cargo clippy -p pass-edge --all-targets --features std --locked -- -D warnings
  cargo clippy -p pass-edge --all-targets --features program --locked -- -D warnings
}

check_test() { # the README's test command, then core with its optional paths
  cargo test --workspace --locked
  cargo test -p pass-core --all-features --locked
}

check_golden() { # the golden set alone, optimized; PASS_GOLDEN_DIR names another set
  cargo test -p pass-tests --release --locked golden
}

check_doc() { # documentation, warnings denied
  RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
}

cross() { # a private cross toolchain out of Debian packages; only a failed download may be a skip
  PARTS="$1" bash tests/cross/setup.sh "$CROSS" || skip "the cross toolchain could not be downloaded"
  # shellcheck disable=SC1091
  . "$CROSS/env.sh"
}

check_nostd() { # core and edge alone, without defaults, for bare targets
  cross "rust src gcc qemu-user qemu-system"
  export RUSTC_BOOTSTRAP=1
  for target in thumbv7em-none-eabihf aarch64-unknown-none; do
    for package in pass-core pass-edge; do
      cargo build --release -p "$package" --target "$target" --no-default-features \
        -Z build-std=core -Z build-std-features=compiler-builtins-mem
    done
  done
}

check_panics() { # a program that links only if nothing in edge can panic: this machine, bare Arm, Cortex-M
  (cd pass-edge/no-panic && cargo build --release --locked)
  cross "rust src gcc qemu-user qemu-system"
  for target in aarch64-unknown-none thumbv7em-none-eabihf; do
    (cd pass-edge/no-panic && RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$PWD/target/cross" cargo rustc --release --locked \
      --target "$target" -Z build-std=core -Z build-std-features=compiler-builtins-mem \
      --config "target.$target.linker=\"ld.lld\"" -- -Z unstable-options -C linker-flavor=gnu-lld)
  done
}

bare_metal() { # `run` or `build` a Cortex-M program (core's, edge's) with a toolchain that brings the sources of core
  cross "rust src gcc qemu-user qemu-system"
  for package in pass-core pass-edge; do
    (cd "$package/bare-metal" && RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$PWD/target" cargo "$1" --release --locked \
      -Zbuild-std=core -Zbuild-std-features=compiler-builtins-mem \
      --config 'target.thumbv7em-none-eabihf.linker="ld.lld"')
  done
}

check_bare-metal() { # core, then a .pass model in flash, on a Cortex-M in an emulator
  bare_metal run
}

check_arm() { # core and edge on emulated aarch64: without dotprod, with it, with i8mm
  cross "rust src gcc qemu-user qemu-system"
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$CROSS/bin/qemu-aarch64"
  # emulation is slow: the kernels, the promises of the kept models and the numbers of threads, not the sweeps
  QEMU_CPU=cortex-a57 cargo test --release -p pass-core --target aarch64-unknown-linux-gnu --lib
  for cpu in cortex-a57 cortex-a76 max; do
    QEMU_CPU=$cpu cargo test --release -p pass-edge --features std --target aarch64-unknown-linux-gnu --lib --test device -- \
      --skip model_file --skip float_twin::features --skip float_twin::every_kernel
  done
}

check_deb() { # the arm64 package of pass-edge: built, looked into, its program run in an emulator
  command -v cargo-deb >/dev/null || cargo install cargo-deb --locked
  cross "rust src gcc qemu-user qemu-system"
  local target=aarch64-unknown-linux-gnu place=target/cross/aarch64-unknown-linux-gnu
  cargo build --release --locked -p pass-edge --features program --target $target
  cargo deb -p pass-edge --target $target --no-build --no-strip --output $place/debian/
  local package; package=$(ls -t $place/debian/*_arm64.deb | head -1)
  dpkg-deb --info "$package" | grep -x ' Architecture: arm64'
  for path in usr/bin/pass-edge usr/lib/pass-edge/stream usr/lib/systemd/system/pass-edge@.service etc/pass-edge/example.conf; do
    dpkg-deb --contents "$package" | grep -F "./$path"
  done
  # the same program as in the package, on models of the tests, as on Nano, Orin and Thor
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$CROSS/bin/qemu-aarch64" PASS_EDGE_RUNNER="$CROSS/bin/qemu-aarch64"
  for cpu in cortex-a57 cortex-a76 max; do
    QEMU_CPU=$cpu cargo test --release --locked -p pass-edge --features program --target $target --test program -- checks
  done
}

check_fuzz() { # core and edge, 30 seconds a target (FUZZ_SECONDS); needs a nightly toolchain and cargo-fuzz
  command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
  for package in pass-core pass-edge; do
    for target in $(cd "$package" && cargo +nightly fuzz list); do
      (cd "$package" && cargo +nightly fuzz run "$target" -- -max_len=8192 -max_total_time="${FUZZ_SECONDS:-30}")
    done
  done
}

check_deny() { # licences, sources, banned crates
  command -v cargo-deny >/dev/null || cargo install cargo-deny --locked
  cargo deny check licenses bans sources
}

check_size() { # bytes of code and data of the bare-metal programs
  bare_metal build
  size pass-*/bare-metal/target/thumbv7em-none-eabihf/release/pass-*-bare-metal
}

check_cuda() { # compiles with CUDA on a machine that has none, and starts there
  cargo fetch --locked
  bash tests/cuda/setup.sh "$CUDA" || skip "the CUDA compiler could not be downloaded"
  # shellcheck disable=SC1091
  . "$CUDA/env.sh"
  CARGO_TARGET_DIR=target/cuda cargo build --release --locked -p pass-host --features cuda
  target/cuda/release/pass-host doctor
  # the driver assembles the kernels at their first use; here for Ampere, Hopper and Blackwell
  for text in $(ls -td target/cuda/release/build/pass-host-*/out/ | head -1)*.ptx; do
    for gpu in sm_80 sm_90 sm_100; do "$CUDA/real/bin/ptxas" -arch=$gpu "$text" -o /dev/null; done
  done
}

check_cuda-kernels() { # every CUDA kernel on the processor: operations, crops, golden set, training steps; needs g++
  cargo test -p pass-host --features _emulator --locked --lib -- ops:: data::loader
  cargo test -p pass-host --features _emulator --locked --test resume crops_of_the_device
  cargo test -p pass-tests --features _emulator --locked --test golden_host --test trainer --test methods
}

check_gpu() { # the same tests built for a GPU, into target/gpu-tests; run there with PASS_DEVICE=cuda (and PASS_GOLDEN_DIR)
  if ! command -v nvcc >/dev/null; then
    cargo fetch --locked
    bash tests/cuda/setup.sh "$CUDA" || skip "the CUDA compiler could not be downloaded"
    # shellcheck disable=SC1091
    . "$CUDA/env.sh"
  fi
  export CARGO_TARGET_DIR=target/cuda
  local build=(cargo test --release --locked --no-run --features "cuda,_emulator") built=target/gpu-tests
  mkdir -p $built
  { "${build[@]}" -p pass-host --lib && "${build[@]}" -p pass-tests --test golden_host --test trainer --test methods; } 2>&1 | tee $built/log
  sed -n 's/.*Executable.*(\(.*\/\([a-z_]*\)-[0-9a-f]*\))/\1 \2/p' $built/log | while read -r file name; do cp "$file" "$built/$name"; done
  nvidia-smi >/dev/null 2>&1 || { echo "no GPU here: $built is ready"; return; }
  export PASS_DEVICE=cuda
  $built/pass_host ops:: && $built/golden_host && $built/trainer && $built/methods
}

check_export() { # every export loaded in the library it is for: timm, transformers, onnx, onnxruntime, from pip or the Python of EXPORT_PYTHON
  local python=${EXPORT_PYTHON:-target/export-venv/bin/python} modules="torch timm transformers onnx onnxruntime PIL safetensors"
  if ! "$python" -c "import ${modules// /, }" 2>/dev/null; then
    python3 -m venv target/export-venv && python=target/export-venv/bin/python
    "$python" -m pip install -q torch timm transformers onnx onnxruntime pillow safetensors ||
      skip "the Python packages could not be installed"
  fi
  cargo build --locked -p pass-host
  "$python" tests/export_check.py target/debug/pass-host fixtures/photos
}

check_package() { # what would be published of each crate: nothing to complain about, licences, builds from its own archive
  local packages=(-p pass-core -p pass-edge -p pass-host --locked --allow-dirty)
  cargo package "${packages[@]}" --no-verify 2>&1 | tee target/package.log
  ! grep -i '^warning' target/package.log || { echo "cargo package warns"; return 1; }
  for crate in pass-core pass-edge pass-host; do
    for file in LICENSE-MIT LICENSE-APACHE README.md; do
      tar -tzf "$(ls -t target/package/"$crate"-*.crate | head -1)" "${crate}-*/$file" --wildcards >/dev/null ||
        { echo "$crate: $file is missing"; return 1; }
    done
  done
  # the examples without default features, documentation with the features of docs.rs
  for crate in pass-core pass-edge; do cargo build --locked -p "$crate" --no-default-features --examples; done
  RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps -p pass-core --all-features
  RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps -p pass-edge --features threads
  RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps -p pass-host
  cargo package "${packages[@]}"
}

check_mpi() { # several ranks: 1, 2 and 4 learn the same, a killed one leaves a checkpoint for 3
  if ! command -v mpirun >/dev/null || ! command -v mpicc >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || skip "MPI is not installed (Debian: libopenmpi-dev openmpi-bin libclang-dev)"
    { apt-get install -y -q libopenmpi-dev openmpi-bin libclang-dev || { apt-get update -q && apt-get install -y -q libopenmpi-dev openmpi-bin libclang-dev; }; } >/dev/null 2>&1 ||
      skip "MPI could not be installed"
  fi
  cargo test -p pass-host --features mpi --locked --test ranks
  cargo clippy -p pass-host --all-targets --features mpi --locked -- -D warnings
}

check_demo() { # the README's first command, cut short
  out=$(mktemp -d)/run
  cargo run --release --locked -p pass-host -- train --out "$out" --steps 8 --set log.every_steps=2
  test -s "$out/metrics.jsonl" && test -s "$out/checkpoints/latest"
}

names() { sed -n 's/^check_\([a-z-]*\)() { # \(.*\)/\1\t\2/p' tests/ci.sh; }

[ $# -gt 0 ] || { names | expand -t 14; exit 0; }
[ "$1" != all ] || set -- fmt clippy doc nostd panics bare-metal arm demo test
for name in "$@"; do
  declare -F "check_$name" >/dev/null || { echo "ci.sh: unknown check \`$name\`; known:" >&2; names | expand -t 14 >&2; exit 2; }
  title "$name"
  ( "check_$name" )
done
