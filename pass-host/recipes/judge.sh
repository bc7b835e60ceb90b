#!/usr/bin/env bash
# Judges weights by every protocol and writes one JSON file each.
#
#   judge.sh WEIGHTS OUT CAMVID DAVIS FLOWERS [PROTOCOL]...
#
# WEIGHTS is whatever `--weights` takes (a run, a file, random:RUN); with OUT = RUN/evaluation, `pass-host report RUN` shows the
# tables. PROTOCOL: vos retrieval knn linear segment-linear segment-fpn [default: all]. PASS_HOST names the program.
set -euo pipefail
weights=$1 out=$2 camvid=$3 davis=$4 flowers=$5
shift 5
[ $# -gt 0 ] || set -- vos retrieval knn linear segment-linear segment-fpn
program=${PASS_HOST:-pass-host}
mkdir -p "$out"
for protocol in "$@"; do
  json=$out/$protocol.json
  case $protocol in
    vos) "$program" eval vos --weights "$weights" --data "$davis" --json "$json" ;;
    retrieval) "$program" eval retrieval --weights "$weights" --data "$camvid" --memory 50000 --json "$json" ;;
    knn) "$program" eval knn --weights "$weights" --data "$flowers" --json "$json" ;;
    linear) "$program" eval linear --weights "$weights" --data "$flowers" --json "$json" ;;
    segment-linear) "$program" eval segment --weights "$weights" --data "$camvid" --head linear --iterations 500 \
      --out "$out/$protocol" --json "$json" ;;
    segment-fpn) "$program" eval segment --weights "$weights" --data "$camvid" --head fpn --preset small --iterations 400 \
      --out "$out/$protocol" --json "$json" ;;
    *) echo "unknown protocol \`$protocol\`" >&2; exit 2 ;;
  esac
done
