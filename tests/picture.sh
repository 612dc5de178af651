#!/bin/bash
# Records the picture of README.md: a terminal session with rpc-server in the upper half and rpc-client in the lower one.
#   TERMTOSVG=PROGRAM tests/picture.sh PROGRAM_FOLDER OUTPUT.svg
set -euo pipefail

here=$(dirname "$0")
scratch=$(mktemp -d)
AMQP_URL=$("$here/broker.sh" start "$scratch/node")
PATH=$(cd "$1" && pwd):$PATH
export AMQP_URL

columns=78 rows=24
socket=$scratch/tmux
session() { tmux -S "$socket" "$@"; }

clean_up() {
    session kill-server 2>/dev/null || true
    "$here/broker.sh" stop "$scratch/node"
    rm -rf "$scratch"
}
trap clean_up EXIT

shell="env -u TMUX PS1='\$ ' HISTFILE= bash --norc --noprofile"
session -f /dev/null new-session -d -x $columns -y $rows -c "$scratch" "$shell"
session set -g status off
session set -g pane-active-border-style default
session split-window -v -l 17 -c "$scratch" "$shell"

# Waits until a command succeeds.
wait_until() {
    local deadline=$((SECONDS + 60))
    until "$@"; do
        [ $SECONDS -lt $deadline ] || { echo "picture: timed out: $*" >&2; exit 1; }
        sleep 0.1
    done
}

# Whether the last line of a pane matches the pattern.
shows() { session capture-pane -p -t "$1" | grep . | tail -n 1 | grep -q -- "$2"; }

wait_for() { wait_until shows "$@"; }

is_recorded() { session list-clients 2>/dev/null | grep -q .; }

# Types a line into a pane as a person does.
type_line() {
    local i
    wait_for "$1" '[$]$'
    for ((i = 0; i < ${#2}; i++)); do
        session send-keys -t "$1" -l "${2:i:1}"
        sleep 0.03
    done
    sleep 0.3
    session send-keys -t "$1" Enter
}

serve() {
    type_line 0 "$1"
    wait_for 0 'Awaiting RPC requests'
}

# Lets a reader read, ends the server, and clears both panes.
start_again() {
    wait_for 1 '[$]$'
    sleep 3
    session send-keys -t 0 C-c
    wait_for 0 '[$]$'
    session send-keys -t 0 C-l
    session send-keys -t 1 C-l
    sleep 0.5
}

play() {
    trap 'session kill-server' EXIT # it also ends the recording, when a wait fails, too
    wait_until is_recorded
    sleep 0.5
    serve 'rpc-server 2>log'
    type_line 1 'rpc-client 30'
    sleep 1
    type_line 1 'answer=$(rpc-client 30) && echo "fib(30) is $answer"'
    type_line 1 'rpc-client --queue missing 30 || echo "exit code $?"'
    start_again
    serve 'rpc-server --queue count -- wc -w 2>log'
    type_line 1 "rpc-client --queue count --data 'to be or not to be'"
    start_again
    serve 'rpc-server --quiet --prefetch 64 2>log'
    type_line 1 'seq 20000 | rpc-client --summary - >answers'
    sleep 1
    wait_for 1 '[$]$'
    sleep 5
}

play &
# termtosvg wants a terminal, and does not know the command by which tmux scrolls an xterm by several lines.
script -qec "$TERMTOSVG $2 -g ${columns}x$rows -m 120 -M 3000 -D 1 -t gjm8 -c 'env TERM=linux tmux -u -S $socket attach'" /dev/null >"$scratch/log"
wait $!
