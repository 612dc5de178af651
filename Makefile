# Every target with a comment behind its name is listed by `make help`.

PREFIX ?= /usr/local
TARGET = $(or $(CARGO_TARGET_DIR),target)
# Where `make broker` keeps its node.
BROKER_DIR ?= $(TARGET)/broker

# Releases are measured, and found beside the program that measures them.
BENCH = cargo run --release --locked --quiet -p rpc-benches --bin against --
CARGO_DOC = RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build check test test-fast bench bench-quick demo broker broker-stop install uninstall clean \
	setup-build setup-broker setup-peers setup-bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: setup-build ## build both programs, optimised, into target/release
	cargo build --release --locked -p rpc-server -p rpc-client

check: setup-build ## formatting, lints and documentation, warnings as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(CARGO_DOC)

test: check setup-broker setup-peers ## check, then all tests on private RabbitMQ nodes (or on that of AMQP_URL)
	cargo test --locked

test-fast: check setup-broker ## the same without the peers in other languages, for the daily loop
	cargo test --locked -- --skip peers::

bench: build setup-broker setup-peers setup-bench ## measure against other libraries, ten minutes; writes table and plot
	$(BENCH)

bench-quick: build setup-broker setup-peers setup-bench ## the same in two minutes, printed only
	$(BENCH) --quick

demo: build $(if $(AMQP_URL),,setup-broker) ## start a broker and a server, ask for fib(30), show the answer, stop both
	tests/demo.sh $(TARGET)/release

broker: setup-broker ## start a private RabbitMQ to play with, and print its URL (PORT=5672 for the default one)
	@url=$$(tests/broker.sh start "$(BROKER_DIR)" $(PORT)) && echo "export AMQP_URL=$$url"

broker-stop: ## stop that RabbitMQ
	@tests/broker.sh stop "$(BROKER_DIR)"

install: ## install both programs into PREFIX/bin (PREFIX=/usr/local)
	@# by sudo, what `make build` has built is installed: root may have no cargo, or another
	@if [ -z "$$SUDO_UID" ] && command -v cargo >/dev/null; then $(MAKE) build; fi
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(TARGET)/release/rpc-server $(TARGET)/release/rpc-client "$(DESTDIR)$(PREFIX)/bin"

uninstall: ## remove what install installed
	rm -f "$(DESTDIR)$(PREFIX)/bin/rpc-server" "$(DESTDIR)$(PREFIX)/bin/rpc-client"

clean: broker-stop ## remove all that was built
	cargo clean

setup-build:
	@tests/setup.sh build

setup-broker:
	@tests/setup.sh broker

setup-peers:
	@tests/setup.sh peers

setup-bench:
	@tests/setup.sh bench
