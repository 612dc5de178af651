# Every target with a comment behind its name is listed by `make help`.

PREFIX ?= /usr/local
# Where `make broker` keeps its node.
BROKER_DIR ?= target/broker

CARGO_DOC = RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build check test demo broker broker-stop install uninstall clean setup-build setup-broker

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: setup-build ## build both programs, optimised, into target/release
	cargo build --release --locked -p rpc-server -p rpc-client

check: setup-build ## formatting, lints and documentation, warnings as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(CARGO_DOC)

test: check setup-broker ## check, then all tests on a private RabbitMQ (or on that of AMQP_URL)
	cargo test --workspace --locked

demo: build setup-broker ## start a broker and a server, ask for fib(30), show the answer, stop both
	tests/demo.sh target/release

broker: setup-broker ## start a private RabbitMQ to play with, and print its URL (PORT=5672 for the default one)
	@mkdir -p $(dir $(BROKER_DIR))
	@AMQP_URL= tests/broker.sh start $(BROKER_DIR) $(PORT) | sed 's/^/export AMQP_URL=/'

broker-stop: ## stop that RabbitMQ
	@tests/broker.sh stop $(BROKER_DIR)

install: build ## install both programs into PREFIX/bin (PREFIX=/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 target/release/rpc-server target/release/rpc-client $(DESTDIR)$(PREFIX)/bin

uninstall: ## remove what install installed
	rm -f $(DESTDIR)$(PREFIX)/bin/rpc-server $(DESTDIR)$(PREFIX)/bin/rpc-client

clean: broker-stop ## remove all that was built
	cargo clean

setup-build:
	@tests/setup.sh build

setup-broker:
	@tests/setup.sh broker
