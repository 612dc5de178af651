#!/bin/bash
# Runs private RabbitMQ nodes: each has its own name, ports, Erlang cookie and epmd, and all files are below DIR.
#   tests/broker.sh run DIR [PORT]     starts a node and prints its URL when it is ready; stops it when standard input ends
#   tests/broker.sh start DIR [PORT]   like run, but in the background, until `stop`
#   tests/broker.sh stop DIR
#   tests/broker.sh freeze|thaw DIR    stops all processes of the node by SIGSTOP, and continues them
#   tests/broker.sh ctl DIR ARGUMENT...   runs rabbitmqctl on that node
# For a cluster of three nodes, with one URL per node:
#   tests/broker.sh cluster run|start|stop DIR
#   tests/broker.sh cluster kill|freeze|thaw|stop|start DIR N   changes one node (1, 2 or 3); kill is SIGKILL, stop is graceful
#   tests/broker.sh cluster ctl DIR N ARGUMENT...
#
# NODE_ROOT: the folder of another RabbitMQ installation, such as `tests/setup.sh brokers` makes; needs root.
# NODE_PLUGINS: the plugins to enable, separated by commas. NODE_CONFIG: lines to add to rabbitmq.conf.
#
# The process that runs a node holds the other end of its standard input. When that process ends, for whatever reason,
# the node is stopped and DIR is removed.
set -euo pipefail

die() { echo "broker.sh: $*" >&2; exit 1; }

server=/usr/lib/rabbitmq/bin/rabbitmq-server # not the wrappers on the PATH, which change user
rabbitmqctl=/usr/lib/rabbitmq/bin/rabbitmqctl
boot_timeout=120                             # seconds

is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints the first of 16 consecutive free ports: 0 to 2 for AMQP, 3 to 7 and 11 for listeners that tests add, 8
# to 10 for the connections between nodes, 15 for epmd. They are below the ephemeral ports, so that no outgoing connection takes one
# before the node listens.
free_ports() {
    local first port
    while :; do
        first=$((20000 + RANDOM % 750 * 16))
        for port in $(seq "$first" $((first + 15))); do
            is_open "$port" && continue 2
        done
        echo "$first"
        return
    done
}

# Whether a broker listens on port $1: it answers the protocol header with a method frame, type 1.
answers_amqp() {
    local type
    exec 4<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'AMQP\0\0\x09\x01' >&4
    read -r -N 1 -t 5 type <&4 || true
    exec 4>&-
    [ "${type:-}" = $'\x01' ]
} 2>/dev/null

# Sets `enter`, the command that runs a program of the installation $1: by chroot, with /proc, /dev and DIR mounted for
# that program and its children only.
use_root() {
    root=$1
    enter=()
    [ -n "$root" ] || return 0
    [ "$(id -u)" = 0 ] || die "the RabbitMQ in $root runs by chroot, which needs root"
    # shellcheck disable=SC2016 # the other shell expands them
    enter=(unshare --mount bash -c '
        root=$1 dir=$2
        shift 2
        mkdir -p "$root$dir"
        for folder in /proc /dev "$dir"; do mount --rbind "$folder" "$root$folder"; done
        exec chroot "$root" "$@"' - "$root" "$dir")
}

# Writes the folder of node $1: first port $2, epmd port $3. Erlang reads HOME and ERL_EPMD_*; RabbitMQ reads the rest.
configure() {
    local node=$dir/$1 port=$(($2 + $1 - 1)) dist_port=$(($2 + $1 + 7)) epmd_port=$3 number
    mkdir "$node"
    echo "[${NODE_PLUGINS:-}]." >"$node/enabled_plugins"
    cat >"$node/rabbitmq.conf" <<-END
	listeners.tcp.1 = 127.0.0.1:$port
	listeners.tcp.2 = ::1:$port
	log.file.level = info
	${NODE_CONFIG:-}
	END
    [ -e /proc/net/if_inet6 ] || sed -i '/::1/d' "$node/rabbitmq.conf"
    [ "$nodes" = 1 ] || for number in $(seq "$nodes"); do
        echo "cluster_formation.classic_config.nodes.$number = rpc-$(($2 + number - 1))@localhost"
    done >>"$node/rabbitmq.conf"
    printf '%s\n' "HOME=$dir" "ERL_EPMD_PORT=$epmd_port" ERL_EPMD_ADDRESS=127.0.0.1 \
        "RABBITMQ_NODENAME=rpc-$port@localhost" "RABBITMQ_DIST_PORT=$dist_port" \
        "RABBITMQ_CONFIG_FILE=$node/rabbitmq.conf" "RABBITMQ_ADVANCED_CONFIG_FILE=$node/none" \
        "RABBITMQ_CONF_ENV_FILE=$node/none" "RABBITMQ_ENABLED_PLUGINS_FILE=$node/enabled_plugins" \
        "RABBITMQ_MNESIA_BASE=$node/data" "RABBITMQ_LOG_BASE=$node/log" \
        "RABBITMQ_GENERATED_CONFIG_DIR=$node/config" "RABBITMQ_PID_FILE=$node/rabbitmq.pid" \
        "ERL_CRASH_DUMP=$node/erl_crash.dump" \
        'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}' >"$node/env"
    echo "$port" >"$node/port"
}

# Runs a command in the environment of node $1.
run_at() {
    local environment
    mapfile -t environment <"$dir/$1/env"
    shift
    unset RABBITMQ_NODE_PORT RABBITMQ_NODE_IP_ADDRESS RABBITMQ_LOGS
    exec env "${environment[@]}" "$@"
}

# Starts node $1 in its own process group.
launch() {
    run_at "$1" setsid "${enter[@]}" "$server" </dev/null >"$dir/$1/out" 2>&1 3<&- &
    echo $! >"$dir/$1/pid"
    [ -z "$cluster" ] || disown # otherwise bash reports each killed node
}

# Waits until node $1 accepts connections.
wait_for_node() {
    local pid
    pid=$(cat "$dir/$1/pid")
    until answers_amqp "$(cat "$dir/$1/port")"; do
        kill -0 "$pid" 2>/dev/null || { cat "$dir/$1/out" >&2; die "node $1 did not start"; }
        [ "$SECONDS" -lt "$boot_timeout" ] || { cat "$dir/$1/out" >&2; die "node $1 was not up in $boot_timeout s"; }
        sleep 0.1
    done
}

# Whether process $1 belongs to the nodes: its HOME is DIR. The process id may have been reused.
is_ours() { grep -qszxF -- "HOME=$dir" "/proc/$1/environ"; }

# Kills all processes of the nodes. They have no data to save.
kill_all() {
    local pid
    for pid in $(cat "$dir"/*/pid 2>/dev/null); do
        if is_ours "$pid"; then kill -9 -- "-$pid" 2>/dev/null || true; fi
    done
}

clean_up() {
    trap - EXIT INT TERM
    exec 2>/dev/null # bash would report the killed processes
    kill_all
    [ -z "${stdin_pid:-}" ] || kill "$stdin_pid" || true
    wait || true
    remove
}

remove() {
    [ -z "$root" ] || rmdir "$root$dir" 2>/dev/null || true
    local tries
    for tries in $(seq 50); do # a node that is being killed may still write
        ! rm -rf "$dir" 2>/dev/null || return 0
        sleep 0.1
    done
    die "cannot remove $dir (tried $tries times)"
}

run() {
    local ports first epmd_port n
    root=${NODE_ROOT:-}
    [ -z "$root" ] || root=$(cd "$root" && pwd) || die "NODE_ROOT: no folder '$NODE_ROOT'"
    use_root "$root"
    [ -x "$root$server" ] || die "no $root$server: run 'tests/setup.sh broker' first"
    mkdir -p "$dir"
    [ -z "$(ls -A "$dir")" ] || die "$dir is not empty: if another node is running there, stop it first"
    exec 3<&0
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo $$ >"$dir/pid"
    echo "$root" >"$dir/root"

    [[ ${1:-5672} =~ ^[0-9]{1,5}$ && ${1:-5672} -ge 1 && ${1:-5672} -le 65535 ]] || die "'$1' is not a port"
    ports=$(free_ports) epmd_port=$((ports + 15)) first=${1:-$ports}
    is_open "$first" && die "port $first is in use"
    for n in $(seq "$nodes"); do configure "$n" "$first" "$epmd_port"; done
    # Created before the nodes start: each of them would create its own.
    (umask 377 && od -An -N10 -tx1 /dev/urandom | tr -d ' \n' >"$dir/.erlang.cookie")
    mkdir "$dir/epmd"
    run_at 1 setsid "${enter[@]}" epmd -port "$epmd_port" </dev/null >"$dir/epmd/out" 2>&1 3<&- &
    echo $! >"$dir/epmd/pid"
    for n in $(seq "$nodes"); do launch "$n"; done
    for n in $(seq "$nodes"); do wait_for_node "$n"; done
    [ "$nodes" = 1 ] || ctl 1 await_online_nodes "$nodes" >&2
    for n in $(seq "$nodes"); do echo "amqp://localhost:$(cat "$dir/$n/port")"; done

    cat <&3 >/dev/null &
    stdin_pid=$!
    if [ "$nodes" = 1 ]; then
        wait -n "$stdin_pid" "$(cat "$dir/1/pid")" || true
        if kill -0 "$stdin_pid" 2>/dev/null; then
            tail -n 30 "$dir/1/out" >&2
            die "the node stopped by itself: see its output above"
        fi
    fi
    wait "$stdin_pid" || true # the nodes of a cluster may be stopped and started
}

ctl() {
    local n=$1
    shift
    (run_at "$n" "${enter[@]}" "$rabbitmqctl" --quiet "$@")
}

# Whether process group $1 has a thread in a state other than those in $2 (letters as in proc(5)).
has_state_other_than() {
    { cat /proc/[0-9]*/task/[0-9]*/stat 2>/dev/null || true; } |
        awk -v group="$1" -v states="$2" '{ sub(/.*\) /, "") } $3 == group && !index(states, $1) { found = 1 } END { exit !found }'
}

# Prints the process group of node $1.
group_of() {
    local group
    group=$(cat "$dir/$1/pid")
    is_ours "$group" || die "node $1 is not running"
    echo "$group"
}

kill_node() {
    local group
    group=$(group_of "$1")
    kill -9 -- "-$group"
    while has_state_other_than "$group" ZX; do sleep 0.01; done
}

freeze_node() {
    local group
    group=$(group_of "$1")
    kill -STOP -- "-$group"
    while has_state_other_than "$group" TZX; do :; done # a running thread stops only when it handles the signal
}

thaw_node() {
    local group
    group=$(group_of "$1")
    kill -CONT -- "-$group"
}

stop_node() {
    local group
    group=$(group_of "$1")
    kill "$group" # RabbitMQ's start script, which stops the Erlang VM
    while has_state_other_than "$group" ZX; do sleep 0.1; done
}

start_node() {
    if is_ours "$(cat "$dir/$1/pid")"; then die "node $1 is running"; fi
    launch "$1"
    wait_for_node "$1"
}

# Whether the script that runs the nodes is running: DIR is among its arguments. The process id may have been reused.
is_running() { grep -qszxF -- "$dir" "/proc/$(cat "$dir/pid" 2>/dev/null)/cmdline"; }

start() {
    if ! is_running; then
        stop # removes the files of a killed one
        mkfifo "$dir.stdin"
        : >"$dir.url"
        trap stop INT TERM
        # The pipe is opened for reading and writing, so it never ends: the nodes run until `stop`.
        setsid "$0" ${cluster:+cluster} run "$dir" "$@" 0<>"$dir.stdin" >"$dir.url" 2>"$dir.err" &
        until [ "$(wc -l <"$dir.url")" = "$nodes" ]; do
            kill -0 $! 2>/dev/null || { cat "$dir.err" >&2; stop; exit 1; }
            sleep 0.1
        done
    fi
    if [ -z "$cluster" ] && [ $# -gt 0 ] && ! grep -q ":$1\$" "$dir.url"; then
        die "a node runs already, on another port than $1: $(cat "$dir.url"); stop it first (make broker-stop)"
    fi
    cat "$dir.url"
}

stop() {
    local pid
    if [ -e "$dir" ] && [ ! -e "$dir/pid" ] && [ -n "$(ls -A "$dir")" ]; then
        die "$dir is not the folder of a node"
    fi
    if is_running; then
        pid=$(cat "$dir/pid")
        kill "$pid" 2>/dev/null || true
        while is_running; do sleep 0.1; done
    fi
    kill_all # a killed script leaves its nodes running
    remove
    rm -rf "$dir".{stdin,url,err}
}

usage() { die "usage: broker.sh [cluster] COMMAND DIR [ARGUMENT...]: see the comment at the top of $0"; }

# Runs command $1 on node $2.
on_node() {
    local command=$1 n=$2
    shift 2
    [ -e "$dir/$n/env" ] || die "no node is running in $dir"
    case $command in
        kill | freeze | thaw | stop | start) "${command}_node" "$n" ;;
        ctl) ctl "$n" "$@" ;;
        *) usage ;;
    esac
}

nodes=1 cluster=
if [ "${1:-}" = cluster ]; then
    nodes=3 cluster=yes
    shift
fi
[ $# -ge 2 ] || usage
command=$1
mkdir -p "$(dirname "$2")"
dir=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
shift 2
use_root "$(cat "$dir/root" 2>/dev/null || true)"
if [ -n "$cluster" ] && [ $# -gt 0 ]; then
    [[ $1 =~ ^[1-3]$ ]] || die "'$1' is not a node number (1, 2 or 3)"
    on_node "$command" "$@"
else
    case $command in
        run | start | stop) "$command" "$@" ;;
        freeze | thaw | ctl) [ -z "$cluster" ] || usage; on_node "$command" 1 "$@" ;;
        *) usage ;;
    esac
fi
