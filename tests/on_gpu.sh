#!/usr/bin/env bash
# All that needs a GPU in one call, about seven minutes: tests/on_gpu.sh FOLDER [bench group ...]
#
# The `-m cuda` suite and, beside it, every kernel under the four tools of compute-sanitizer; then, with nothing else
# running, the benchmarks. Reports go to FOLDER; the end of each is printed. STYLEFORGE_LIBRARY_PATH names the folder of
# the libraries, which may have been built on another machine; JOBS is the number of test processes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for the reports}
shift
mkdir -p "$out"
export PYTHONPATH=python PYTHONUNBUFFERED=1
tools="memcheck racecheck initcheck synccheck"

# racecheck also reports kernels of cuBLAS (nvjet_*) under the small 16-bit networks: theirs, look for ours. Leaving
# them out by --kernel-name ends in an error of the tool itself.
# racecheck takes several times as long as the others: a process for each part. The library kernels that we call take
# some tools minutes (--no-conv).
groups_of() {
  case $1 in
    memcheck) echo "" ;;
    initcheck) echo "--no-conv --no-copy-engine" ;;
    synccheck) echo "--no-conv" ;;
    racecheck)
      local group
      for group in norm products attention "formats gradients" conv-contiguous conv-channels-last; do
        echo "$group --no-conv"
      done
      ;;
  esac
}
sanitizers=()
reports=()
sanitize() {  # REPORT TOOL ARGUMENTS
  local report=$1 tool=$2
  shift 2
  OMP_NUM_THREADS=1 timeout 420 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 tests/sanitize.py "$@" \
    > "$out/$report.txt" 2>&1 &
  sanitizers+=($!)
  reports+=("$report")
}
for tool in $tools; do
  sanitize "$tool-captured" "$tool" captured
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  part=0
  while read -r groups; do
    # shellcheck disable=SC2086
    sanitize "$tool-$((++part))" "$tool" $groups
  done < <(groups_of "$tool")
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
done
python3 -m pytest -q --tb=short -n "${JOBS:-12}" --dist worksteal -m cuda tests -p no:cacheprovider --durations=10 \
  > "$out/suite.txt" 2>&1
failed=$?
for pid in "${sanitizers[@]}"; do wait "$pid" || failed=1; done

for report in "${reports[@]}"; do echo "$report: $(tail -n 1 "$out/$report.txt")"; done
grep -E "^E  |^FAILED|^ERROR| passed| failed" "$out/suite.txt" | cut -c1-170 | tail -n 40
for group in "${@:-norm conv ffn host}"; do
  # shellcheck disable=SC2086
  timeout 240 python3 -m styleforge.bench.operators $group > "$out/bench-${group// /-}.txt" 2>&1 || failed=1
  grep -vi warn "$out/bench-${group// /-}.txt" | cut -c1-190
done
exit $failed
