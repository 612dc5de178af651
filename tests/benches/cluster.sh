#!/bin/bash
# Measures calls on a private cluster of three nodes, each row in turn in every round. Prints medians with minimum and maximum.
#   tests/benches/cluster.sh FOLDER [ROUNDS [DURATION]]   FOLDER has the optimised programs; DURATION is that of a row, in seconds
# NODE_ROOT is another RabbitMQ, as for tests/broker.sh.
set -euo pipefail

folder=$1
rounds=${2:-5}
duration=${3:-10}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
cluster=$work/cluster
broker() { "$here/../broker.sh" cluster "$@"; }
trap 'kill $(jobs -p) 2>/dev/null || true; broker stop "$cluster" >/dev/null; rm -rf "$work"' EXIT
mapfile -t urls < <(broker start "$cluster")
version=$(broker ctl "$cluster" 1 version)

# TYPE PREFETCH WORKERS REPLY_TO NODE QUEUES: a server and a client for each queue, which they share evenly. The first queue is on
# node 1 (of a quorum queue: its leader), the second one on node 2, and so on. The programs are on the queue's node (home), or on
# the next one.
rows='transient 1 1 queue home 1
transient 64 1 queue home 1
classic 1 1 queue home 1
classic 64 1 queue home 1
quorum 1 1 queue home 1
quorum 64 1 queue home 1
quorum 1 8 queue home 1
classic 64 1 direct home 1
classic 64 1 queue next 1
quorum 64 1 queue next 1
classic 64 1 queue home 2
classic 64 1 queue home 4
quorum 1 1 queue home 2
quorum 1 1 queue home 4
quorum 64 1 queue home 2
quorum 64 1 queue home 4'

# The URL of the home of queue $1, or of the next node.
url_for() {
    local step=0
    [ "$2" = home ] || step=1
    echo "${urls[($1 - 1 + step) % 3]}"
}

start_servers() { # TYPE PREFETCH WORKERS REPLY_TO NODE QUEUES
    local n server=("$folder/rpc-server" -q --queue-type "$1" --prefetch "$2" --workers "$3")
    for n in $(seq "$6"); do
        # The node of the connection that declares a queue becomes its home.
        timeout --preserve-status 2 "${server[@]}" --queue "$row/$n" --url "$(url_for "$n" home)" >/dev/null 2>&1
        "${server[@]}" --queue "$row/$n" --url "$(url_for "$n" "$5")" >/dev/null 2>&1 &
    done
}

# Seconds of CPU time that the nodes have used.
cpu() {
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk -v groups="$(cat "$cluster"/[123]/pid | tr '\n' ' ')" -v tick="$(getconf CLK_TCK)" '
        { sub(/.*\) /, "") } index(" " groups, " " $3 " ") { sum += $12 + $13 } END { print sum / tick }'
}

measure() { # like start_servers; appends calls/s, p50 in us, and CPU time per call in us
    local n before clients=()
    before=$(cpu)
    for n in $(seq "$6"); do
        # Ctrl-C ends the run, with its summary.
        timeout --signal INT "$duration" "$folder/rpc-client" --queue "$row/$n" --url "$(url_for "$n" "$5")" --reply-to "$4" \
            --repeat 100000000 -j 64 -q --summary=json 30 2>"$work/summary-$n" >/dev/null &
        clients+=($!)
    done
    wait "${clients[@]}" || true
    for n in $(seq "$6"); do tail -n 1 "$work/summary-$n"; done |
        sed -E 's/.*"calls":([0-9]+).*"calls_per_second":([0-9.]+).*"p50":([0-9.]+).*/\1 \2 \3/' |
        awk -v before="$before" -v after="$(cpu)" '
            { calls += $1; rate += $2; if ($3 > p50) p50 = $3 }
            END { print rate "\t" p50 * 1000 "\t" (after - before) / calls * 1e6 }' >>"$work/$row"
}

# Median, minimum and maximum of column $1 of file $2.
median() { cut -f "$1" "$2" | sort -g | awk '{ a[NR] = $1 } END { printf "%.0f (%.0f to %.0f)", (a[int((NR + 1) / 2)] + a[int(NR / 2) + 1]) / 2, a[1], a[NR] }'; }

in_rows() { # COMMAND: runs it with the words of each row
    local row=0 words
    while read -r -a words; do
        row=$((row + 1))
        "$1" "${words[@]}" </dev/null
    done <<<"$rows"
}

print_row() {
    printf '| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n' "$@" "$(median 1 "$work/$row")" "$(median 2 "$work/$row")" "$(median 3 "$work/$row")"
}

in_rows start_servers
for round in $(seq "$rounds"); do
    echo "round $round of $rounds" >&2
    in_rows measure
done
echo "RabbitMQ $version, $rounds rounds of $duration s"
echo '| queue | prefetch | workers | replies | programs on | queues | calls/s | p50 in us | CPU of the nodes per call in us |'
echo '| --- | --- | --- | --- | --- | --- | --- | --- | --- |'
in_rows print_row
