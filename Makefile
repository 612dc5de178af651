# Every target with a comment behind its name is listed by `make help`.

PREFIX ?= /usr/local
TARGET = $(or $(CARGO_TARGET_DIR),target)
# Where `make broker` and `make cluster` keep their nodes. NODE_ROOT=target/brokers/sid has them run another RabbitMQ
# than this system's, of those that `make test-brokers` installs.
BROKER_DIR ?= $(TARGET)/broker
CLUSTER_DIR ?= $(TARGET)/cluster

# How long `make fuzz` runs.
FUZZ_SECONDS ?= 600

# Releases are measured, and found beside the program that measures them.
BENCH = cargo run --release --locked --quiet -p rpc-benches --bin against --
CARGO_DOC = RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build check test test-fast test-brokers test-cluster fuzz bench bench-quick demo broker broker-stop \
	cluster cluster-stop install uninstall clean setup-build setup-broker setup-brokers setup-peers setup-fuzz setup-bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

test-brokers: setup-build setup-brokers setup-peers ## the integration tests on RabbitMQ 4.0 and 4.3 (root, 20 minutes)
	tests/test-brokers.sh

test-cluster: setup-build setup-broker ## the tests on a cluster of three nodes
	cargo test --locked -p rpc-tests -- cluster::

fuzz: setup-fuzz ## feed made-up frames to what makes frames harmless, for FUZZ_SECONDS (600)
	@# without a sanitizer, which needs a nightly compiler and finds nothing in code without `unsafe`
	@mkdir -p "$(TARGET)/fuzz/sanitize"
	cargo fuzz run --fuzz-dir tests/fuzz --target-dir "$(TARGET)" --sanitizer none sanitize \
		"$(TARGET)/fuzz/sanitize" tests/fuzz/corpus/sanitize -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

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

cluster: setup-broker ## start a private cluster of three nodes, and print their URLs
	@urls=$$(tests/broker.sh cluster start "$(CLUSTER_DIR)") && set -- $$urls && \
		echo "export AMQP_URL=$$1; # node 1; all nodes: --url $$1 --url $$2 --url $$3"

cluster-stop: ## stop that cluster
	@tests/broker.sh cluster stop "$(CLUSTER_DIR)"

install: ## install both programs into PREFIX/bin (PREFIX=/usr/local)
	@# by sudo, what `make build` has built is installed: root may have no cargo, or another
	@if [ -z "$$SUDO_UID" ] && command -v cargo >/dev/null; then $(MAKE) build; fi
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(TARGET)/release/rpc-server $(TARGET)/release/rpc-client "$(DESTDIR)$(PREFIX)/bin"

uninstall: ## remove what install installed
	rm -f "$(DESTDIR)$(PREFIX)/bin/rpc-server" "$(DESTDIR)$(PREFIX)/bin/rpc-client"

clean: broker-stop cluster-stop ## remove all that was built
	cargo clean

setup-build:
	@tests/setup.sh build

setup-broker:
	@tests/setup.sh broker

setup-brokers:
	@tests/setup.sh brokers

setup-peers:
	@tests/setup.sh peers

setup-bench:
	@tests/setup.sh bench

setup-fuzz:
	@tests/setup.sh fuzz
