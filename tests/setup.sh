#!/bin/sh
# Installs what is missing, from the packages of the distribution. It prints what it installs and why, and starts no
# service.
#   tests/setup.sh build     what the compiler needs
#   tests/setup.sh broker    RabbitMQ, for private nodes
#   tests/setup.sh brokers   RabbitMQ of newer Debian releases, for private nodes: each in a folder below target/brokers
#   tests/setup.sh deb       what builds the Debian package
#   tests/setup.sh container   systemd-nspawn, and a clean Debian 12 for it in target/container
#   tests/setup.sh peers     the languages of the peers, and below target/peers their AMQP libraries; promtool
#   tests/setup.sh fuzz      cargo-fuzz, from crates.io, and the C++ compiler
#   tests/setup.sh deps      cargo-deny, from crates.io
#   tests/setup.sh bench     for the benchmarks: below target/peers the peers in C and on lapin; valgrind and time
#   tests/setup.sh picture   what records the picture of README.md: tmux, and below target/peers termtosvg
set -eu

# Debian starts and enables the services of a package that it installs, such as a broker on port 5672. This policy
# file, see invoke-rc.d(8), forbids all service actions during an installation.
policy=/usr/sbin/policy-rc.d
mark='# written by tests/setup.sh during an installation'
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../target}
built=$target/peers

log_line() { echo "setup: $*" >&2; }
die() { log_line "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "not root and no sudo: run as root: $*"
    fi
}

apt_install() {
    why=$1; shift
    command -v apt-get >/dev/null || die "$why: install $* (this script supports only apt-get of Debian and Ubuntu)"
    log_line "installing $* with apt-get: $why"
    log=$(mktemp)
    if ! { as_root apt-get -qq update &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
            -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@"; } >"$log" 2>&1
    then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get failed, see above"
    fi
    rm -f "$log"
}

forbid_services() {
    trap allow_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # An interrupted run may have left its policy.
    if [ -e "$policy" ] && ! grep -q "$mark" "$policy" && [ ! -e "$policy.saved-by-setup" ]; then as_root mv "$policy" "$policy.saved-by-setup"; fi
    printf '#!/bin/sh\n%s\nexit 101\n' "$mark" | as_root tee "$policy" >/dev/null
    as_root chmod +x "$policy"
}

allow_services() {
    as_root rm -f "$policy"
    if [ -e "$policy.saved-by-setup" ]; then as_root mv "$policy.saved-by-setup" "$policy"; fi
    trap - EXIT
}

install_without_services() {
    forbid_services
    apt_install "$@"
    allow_services
}

# So that they do not start at the next boot either.
disable_services() {
    if command -v systemctl >/dev/null; then as_root systemctl --quiet disable "$@" 2>/dev/null || true; fi
}

build() {
    command -v cargo >/dev/null || die "cargo is missing: install Rust from https://rustup.rs first"
    command -v cc >/dev/null || apt_install "Rust links with the C compiler's linker" gcc libc6-dev
}

broker() {
    [ ! -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || return 0
    install_without_services "the broker of the calls; it runs as private nodes, not as a service" rabbitmq-server
    disable_services rabbitmq-server.service epmd.service epmd.socket
}

# Installs Debian's release $2 with the packages $3 into folder $1 below target. $4 says what for. To get newer packages, remove
# that folder.
install_debian() {
    folder=$target/$1
    [ ! -e "$folder" ] || return 0
    [ "$(id -u)" = 0 ] || die "debootstrap and chroot, for $4, need root: run as root"
    command -v debootstrap >/dev/null ||
        apt_install "it installs a Debian into its own folder" debootstrap debian-archive-keyring
    log_line "installing Debian's $2 with $3 into target/$1 (a minute): $4"
    rm -rf "$folder.new"
    mkdir -p "$(dirname "$folder")"
    log=$(mktemp)
    debootstrap --variant=minbase --include="$3" "$2" "$folder.new" >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; rm -f "$log"; die "debootstrap failed, see above"; }
    rm -f "$log" "$folder.new"/var/cache/apt/archives/*.deb
    echo '127.0.0.1 localhost' >"$folder.new/etc/hosts" # not every release has it, and the name must resolve
    mv "$folder.new" "$folder"
}

# tests/broker.sh runs these by chroot.
brokers() {
    for release in trixie sid; do
        install_debian "brokers/$release" "$release" rabbitmq-server "a newer broker for the tests"
    done
}

deb() {
    build
    command -v dpkg-shlibdeps >/dev/null || apt_install "it finds the dependencies of the package" dpkg-dev
}

# tests/test-deb.sh runs it by systemd-nspawn.
container() {
    command -v systemd-nspawn >/dev/null || apt_install "it runs systemd in a container, for the test of the package" systemd-container
    install_debian container bookworm systemd-sysv "the test of the package"
}

has_venv() { python3 -c 'import ensurepip, venv' 2>/dev/null; }

peers() {
    missing=
    command -v php >/dev/null || missing="$missing php-cli"
    [ -e /usr/share/php/PhpAmqpLib/autoload.php ] || missing="$missing php-amqplib"
    command -v go >/dev/null || missing="$missing golang-go"
    [ -d /usr/share/gocode/src/github.com/rabbitmq/amqp091-go ] ||
        missing="$missing golang-github-rabbitmq-amqp091-go-dev"
    has_venv || missing="$missing python3-venv"
    command -v node >/dev/null || missing="$missing nodejs"
    command -v npm >/dev/null || missing="$missing npm"
    perl -MAnyEvent::RabbitMQ -e 1 2>/dev/null || missing="$missing libanyevent-rabbitmq-perl"
    /usr/bin/python3 -c 'import proton' 2>/dev/null || missing="$missing python3-qpid-proton" # AMQP 1.0
    command -v jq >/dev/null || missing="$missing jq" # for recipes in rpc-client/README.md
    command -v parallel >/dev/null || missing="$missing parallel"
    command -v identify >/dev/null || missing="$missing imagemagick" # for a recipe in rpc-server/README.md
    command -v openssl >/dev/null || missing="$missing openssl" # for certificates in rpc-server/README.md
    command -v systemd-analyze >/dev/null || missing="$missing systemd" # it checks the unit of rpc-server
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || apt_install "the peers in other languages, for the tests" $missing
    command -v promtool >/dev/null || {
        install_without_services "promtool checks the server's metrics, in a test" prometheus
        disable_services prometheus.service
    }

    mkdir -p "$built"
    if ! cmp -s "$here/peers/python/requirements.txt" "$built/python/installed"; then
        log_line "installing pika from PyPI into target/peers"
        rm -rf "$built/python"
        python3 -m venv "$built/python"
        "$built/python/bin/pip" --quiet install -r "$here/peers/python/requirements.txt"
        cp "$here/peers/python/requirements.txt" "$built/python/installed"
    fi
    if ! cmp -s "$here/peers/node/package.json" "$built/node/package.json"; then
        log_line "installing amqplib from npm into target/peers"
        rm -rf "$built/node" && mkdir -p "$built/node.new"
        cp "$here/peers/node/package.json" "$built/node.new"
        npm --prefix "$built/node.new" install --silent --no-package-lock --no-audit --no-fund
        mv "$built/node.new" "$built/node"
    fi
    # Debian installs Go libraries below GOPATH: no modules, no network.
    for program in server client; do
        source=$here/peers/go/$program/main.go
        [ "$built/go-$program" -nt "$source" ] || (cd "$here/peers/go/$program" &&
            GO111MODULE=off GOFLAGS='' GOPATH=/usr/share/gocode go build -o "$built/go-$program" .)
    done
}

fuzz() {
    build
    command -v c++ >/dev/null || apt_install "libFuzzer is written in C++" g++
    cargo fuzz --version >/dev/null 2>&1 || {
        log_line "installing cargo-fuzz from crates.io"
        cargo install --quiet --locked cargo-fuzz
    }
}

deps() {
    build
    cargo deny --version >/dev/null 2>&1 || {
        log_line "installing cargo-deny from crates.io"
        cargo install --quiet --locked cargo-deny
    }
}

has_header() { echo "#include <$1>" | cc -E -x c - >/dev/null 2>&1; }

bench() {
    build
    missing=
    has_header amqp.h || missing="$missing librabbitmq-dev"
    has_header gmp.h || missing="$missing libgmp-dev"
    command -v valgrind >/dev/null || missing="$missing valgrind"
    command -v amqp-consume >/dev/null || missing="$missing amqp-tools"
    [ -x /usr/bin/time ] || missing="$missing time" # the shell's keyword does not report memory
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || apt_install "for the benchmarks" $missing

    mkdir -p "$built"
    for program in server client; do
        source=$here/peers/c/$program.c
        { [ "$built/c-$program" -nt "$source" ] && [ "$built/c-$program" -nt "$here/peers/c/rpc.h" ]; } ||
            cc -O2 -Wall -Wextra -o "$built/c-$program" "$source" -lrabbitmq
    done
    [ "$built/c-spawn" -nt "$here/peers/c/spawn.c" ] || cc -O2 -Wall -Wextra -o "$built/c-spawn" "$here/peers/c/spawn.c"
    [ "$built/c-fib" -nt "$here/peers/c/fib.c" ] ||
        cc -O2 -Wall -Wextra -o "$built/c-fib" "$here/peers/c/fib.c" -lgmp
    [ -e "$built/lapin-client" ] || log_line "building lapin from crates.io into target/peers"
    cargo build --quiet --release --locked --manifest-path "$here/peers/lapin/Cargo.toml" --target-dir "$built/lapin"
    for program in server client; do
        ln -sf "lapin/release/lapin-$program" "$built/lapin-$program"
    done
}

picture() {
    missing=
    command -v tmux >/dev/null || missing="$missing tmux"
    has_venv || missing="$missing python3-venv"
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || apt_install "to record the picture of README.md" $missing
    [ -x "$built/picture/bin/termtosvg" ] || {
        log_line "installing termtosvg from PyPI into target/peers"
        python3 -m venv "$built/picture"
        "$built/picture/bin/pip" --quiet install termtosvg==1.1.0
    }
}

for part in "$@"; do
    case $part in
        build | broker | brokers | deb | container | peers | fuzz | deps | bench | picture) "$part" ;;
        *) die "unknown part '$part'" ;;
    esac
done
