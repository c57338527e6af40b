#!/usr/bin/env bash
# Fuzzes targets in turns: `tests/fuzz/turns.sh PROGRAM FOLDER SECONDS TARGET…`, until it is stopped. PROGRAM is what run.sh
# built. In FOLDER: corpus/TARGET, artifacts/TARGET, and turns.tsv with a line for each turn: when it ended, target,
# executions, CPU seconds, edges covered, features covered, files in the corpus, findings. Where the processes are stopped now and
# then, CROSSCODER_FUZZ_TIMEOUT must exceed the pauses: libFuzzer goes by the wall clock.
set -euo pipefail
program=$(realpath -- "$1") folder=$2 seconds=$3
shift 3
mkdir -p "$folder"
cd "$folder"
TIMEFORMAT='cpu %U %S'
while :; do
  for target; do
    mkdir -p "corpus/$target" "artifacts/$target"
    CROSSCODER_FUZZ=seeds:$target:corpus/$target "$program" 2>/dev/null
    log=turn-$target-$$.log
    { time CROSSCODER_FUZZ=$target "$program" "corpus/$target" -max_total_time="$seconds" -timeout="${CROSSCODER_FUZZ_TIMEOUT:-5}" -rss_limit_mb=1024 \
      -artifact_prefix="artifacts/$target/" -max_len=8192 -print_final_stats=1 >/dev/null 2>"$log" || true; } 2>"$log.cpu"
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    # A program that does not start, or is stopped before its first execution, finds nothing either.
    [ "${executions:-0}" -gt 0 ] || { echo "$target: nothing was executed; see $folder/$log" >&2 && exit 1; }
    cpu=$(awk '/^cpu/ {print $2 + $3}' "$log.cpu")
    reached=$(grep -aoE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -1 | awk '{print $2 "\t" $4}' || true)
    files=$(find "corpus/$target" -type f | wc -l)
    findings=$(find "artifacts/$target" -type f | wc -l)
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$target" "$executions" "$cpu" "$reached" "$files" "$findings" >>turns.tsv
  done
done
