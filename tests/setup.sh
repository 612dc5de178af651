#!/bin/sh
# Installs what is missing, from the distribution's packages; says what and why; starts no service.
#   tests/setup.sh build     what the compiler needs
#   tests/setup.sh broker    RabbitMQ, for a private node (nothing where AMQP_URL names a broker)
set -eu

# Debian starts (and enables) a broker on port 5672 when its package is installed. This policy, in
# the words of invoke-rc.d(8), forbids every service action while we install.
policy=/usr/sbin/policy-rc.d

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "not root and no sudo: run as root: $*"
    fi
}

apt_install() {
    why=$1; shift
    command -v apt-get >/dev/null || die "$why: install $* (this script knows Debian's and Ubuntu's apt-get only)"
    say "installing $* with apt-get: $why"
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

hold_services_back() {
    trap release_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if [ -e "$policy" ] && [ ! -e "$policy.saved-by-setup" ]; then as_root mv "$policy" "$policy.saved-by-setup"; fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod +x "$policy"
}

release_services() {
    as_root rm -f "$policy"
    if [ -e "$policy.saved-by-setup" ]; then as_root mv "$policy.saved-by-setup" "$policy"; fi
    trap - EXIT
}

build() {
    command -v cargo >/dev/null || die "no cargo: install Rust from https://rustup.rs first"
    command -v cc >/dev/null || apt_install "Rust links with the C compiler's linker" gcc libc6-dev
}

broker() {
    [ -z "${AMQP_URL:-}" ] || return 0
    [ ! -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || return 0
    hold_services_back
    apt_install "the broker that carries the calls; only private nodes of ours run, no service" rabbitmq-server
    release_services
    # Nor shall a service start with the next boot of a machine whose owner never asked for one.
    if command -v systemctl >/dev/null; then
        as_root systemctl --quiet disable rabbitmq-server.service epmd.service epmd.socket 2>/dev/null || true
    fi
}

for part in "$@"; do
    case $part in
        build | broker) "$part" ;;
        *) die "unknown part '$part'" ;;
    esac
done
