#!/bin/bash
# Rows side by side on a GPU machine that has no network and ends every call after some minutes, in three phases:
#   tools/gpu.sh start 570     unpacks the images, runs the GPU tests, tries every method compiled, begins the lanes
#   tools/gpu.sh wait 570      looks on while the lanes go on, as often as there is time
#   tools/gpu.sh stop 60       ends the lanes, each after it has written its checkpoint
# Run in the root of the source tree, with the machine's own Python (PY). A lane is a queue of its own (`ddlib queue`) in
# a session of its own, so it outlives the call; all work lies in $WORK, outside the tree. Each phase leaves what is
# worth keeping in $OUT, in pieces of 15 MiB: cat results.tar.* | tar xf - -C results/
# Images: $IMAGES is a .tar.xz that unpacks to cifar10/train and cifar10/test. Without a GPU, as a trial on the digits:
#   QUICK=1 DEVICE=cpu OUT=$(mktemp -d) WORK=$(mktemp -d) tools/gpu.sh start 60
set -u
PHASE=${1:?start, wait or stop} LEFT=${2:-570}
DEVICE=${DEVICE:-cuda} PY=${PY:-python3} MINUTES=${MINUTES:-26}
WORK=${WORK:-${TMPDIR:-/tmp}/ddlib-gpu} OUT=${OUT:?a folder for the results} IMAGES=${IMAGES:-.carry/cifar10-jpeg.tar.xz}
END=$(( $(date +%s) + LEFT ))
mkdir -p "$WORK/log" "$OUT"
export DDLIB_DATA=$WORK/data DDLIB_CACHE=$WORK/cache DDLIB_RESULTS=$WORK/results PYTHONPATH=$WORK/src
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1 MPLBACKEND=agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_COMPILE_THREADS=4
[ -d .git ] && export DDLIB_COMMIT=${DDLIB_COMMIT:-$(git rev-parse HEAD)}
PROFILE=paper; [ "${QUICK:-}" ] && PROFILE=smoke

lane() { # lane NAME COMMAND...: in a session of its own
  local name=$1; shift
  (cd "$WORK/src" && setsid bash -c 'echo $$ > "$0"; exec "$@"' "$WORK/log/$name.pid" "$@" \
    > "$WORK/log/$name.log" 2>&1 < /dev/null &)
  until [ -s "$WORK/log/$name.pid" ]; do sleep 0.1; done
}

queue() { # queue NAME [PROFILE]: the rows on standard input, cheapest first
  cat > "$WORK/log/$1.yaml"
  rm -f "$WORK/log/$1.pid"
  lane "$1" "$PY" -m ddlib queue "$WORK/log/$1.yaml" --profile "${2:-$PROFILE}" --device "$DEVICE" --minutes "$MINUTES"
}

start() {
  rm -rf "$WORK/src"; mkdir -p "$WORK/src" "$DDLIB_DATA" "$DDLIB_RESULTS"
  cp -r ddlib benchmarks tests pyproject.toml "$WORK/src/"
  [ -f "$IMAGES" ] && tar xJf "$IMAGES" -C "$DDLIB_DATA"
  cd "$WORK/src" || exit 1
  if [ "${QUICK:-}" ]; then
    queue dm <<< '[{method: [random, dm], dataset: digits, ipc: 1, set: {networks: 1, eval_epochs: 5}}]'
    return
  fi
  "$PY" -c "import ddlib; data = ddlib.load('folder:cifar10', device='$DEVICE'); print(data.checksum, data.device)" || exit 1
  timeout 120 "$PY" -m pytest -q -p no:cacheprovider -m gpu tests/unit tests/oracles tests/contract 2>&1 | tail -n 15
  # Two steps of every method, compiled: what fails here would fail ten minutes later. No paper has the digits.
  DDLIB_RESULTS=$WORK/try queue try smoke <<'Y'
- {method: [dm, frepo], dataset: digits, ipc: 1, set: {compile: true, iterations: 2, eval_epochs: 3, networks: 1}}
- {method: [dc, dsa, idc, dream, dream_plus], dataset: digits, ipc: 1, set: {compile: true, iterations: 2, inner: 2, eval_epochs: 3, networks: 1}}
- {method: [mtt, tesla, ftd, datm], dataset: digits, ipc: 1, set: {compile: true, iterations: 2, experts: 1, expert_total: 2, expert_epochs: 1, max_start: 1, eval_epochs: 3, networks: 1}}
Y
  queue dm <<< '[{method: [random, dm], dataset: "folder:cifar10", ipc: [1, 10, 50]}]'
  queue plain <<< '[{method: [mtt, tesla], dataset: "folder:cifar10", ipc: 1, set: {experts: 20, expert_total: 6}}]'
  queue flat <<< '[{method: ftd, dataset: "folder:cifar10", ipc: 1, set: {experts: 20, expert_total: 6}}]'
  queue pixels <<< '[{method: [dream_plus, idc], dataset: "folder:cifar10", ipc: 10, set: {iterations: 40}}]'
  queue frepo <<< '[{method: frepo, dataset: "folder:cifar10", ipc: 1, set: {iterations: 20000}}, {method: dsa, dataset: "folder:cifar10", ipc: 1}]'
}

signal() { # signal NAME: to every lane's own process group
  for file in "$WORK"/log/*.pid; do kill -"$1" -- "-$(cat "$file")" 2> /dev/null; done
}

alive() {
  for file in "$WORK"/log/*.pid; do kill -0 -- "-$(cat "$file")" 2> /dev/null && return 0; done
  return 1
}

bring() {
  (cd "$DDLIB_RESULTS" && find . -type f -not -path './experts/*' -not -path '*/.*' -size -15M -print0 \
    | tar cf - --null -T - | split -b 15M - "$OUT/results.tar.")
  tar czf "$OUT/logs.tgz" -C "$WORK" log
}

report() {
  [ "$DEVICE" = cuda ] && nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader
  for file in "$WORK"/log/*.log; do echo "-- $(basename "$file")"; tail -n 4 "$file" | cut -c1-300; done
}

case $PHASE in
  start) start ;;
  wait) ;;
  stop)
    signal TERM
    while alive && [ "$(date +%s)" -lt $(( END - 20 )) ]; do sleep 1; done
    signal KILL ;;
  *) echo "tools/gpu.sh start, wait or stop, not $PHASE"; exit 2 ;;
esac
while [ "$(date +%s)" -lt $(( END - 30 )) ] && alive; do sleep 2; done
bring; report
