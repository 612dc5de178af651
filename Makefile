# `make help` lists every target that has a `##` comment.

PREFIX ?= /usr/local
TARGET = $(or $(CARGO_TARGET_DIR),target)
# The folders of the nodes of `make broker` and `make cluster`. NODE_ROOT=target/brokers/sid runs a newer RabbitMQ: one of
# those that `make test-brokers` installs.
BROKER_DIR ?= $(TARGET)/broker
CLUSTER_DIR ?= $(TARGET)/cluster

# The systemd unit of rpc-server, and where it is installed.
UNIT = rpc-server@.service
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

# The duration of `make fuzz`.
FUZZ_SECONDS ?= 600

# The benchmark program expects the optimised programs in its own folder.
BENCH = cargo run --release --locked --quiet -p rpc-benches --bin compare --
DENY = cargo deny --config .cargo/deny.toml
CARGO_DOC = RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet --document-private-items

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build check check-deps test test-fast test-brokers test-cluster test-deb fuzz bench bench-quick bench-programs bench-cluster \
	demo picture broker broker-stop cluster cluster-stop generate install uninstall deb clean setup-build setup-broker setup-brokers \
	setup-peers setup-deps setup-fuzz setup-bench setup-picture setup-deb setup-container

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: setup-build ## build both programs, optimised, in target/release
	cargo build --release --locked -p rpc-server -p rpc-client

check: setup-build ## check formatting, lints and documentation; warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(CARGO_DOC)

check-deps: setup-deps ## check the licences, sources, duplicates and known defects of the dependencies
	$(DENY) check licenses sources bans
	@# The database of known defects is a git repository: without a network, an earlier copy serves.
	@if $(DENY) fetch db 2>/dev/null; then $(DENY) check advisories; \
	elif ls -d "$${CARGO_HOME:-$$HOME/.cargo}"/advisory-dbs/advisory-db-* >/dev/null 2>&1; then \
		echo "check-deps: the database of advisories cannot be fetched: an earlier copy is used" >&2; \
		$(DENY) --offline check advisories; \
	else echo "check-deps: the database of advisories cannot be fetched: known defects were not checked" >&2; fi

test: check setup-broker setup-peers ## check, then run all tests on private RabbitMQ nodes (or on the broker of AMQP_URL)
	cargo test --locked

test-fast: check setup-broker ## like test, without promtool and the peers in other languages
	cargo test --locked -- --skip peers:: --skip promtool

test-brokers: setup-build setup-brokers setup-peers ## run the integration tests on RabbitMQ 4.0 and 4.3 (as root; 20 minutes)
	tests/test-brokers.sh

test-cluster: setup-build setup-broker ## try all faults of nodes on a cluster of three (8 minutes); prints a table
	@# with CLUSTER_FAULTS=frozen only the faults with that word in their name
	CLUSTER_FAULTS="$(or $(CLUSTER_FAULTS),all)" cargo test --locked -p rpc-tests -- cluster:: --nocapture

test-deb: deb setup-broker setup-container ## install the package in a clean Debian 12, and run its unit there (as root)
	tests/test-deb.sh "$(TARGET)"

fuzz: setup-fuzz ## fuzz the code that reads the broker's frames and properties, for FUZZ_SECONDS (600)
	@# no sanitizer: it needs a nightly compiler, and finds nothing in code without `unsafe`
	@mkdir -p "$(TARGET)/fuzz/frames"
	cargo fuzz run --fuzz-dir tests/fuzz --target-dir "$(TARGET)" --sanitizer none frames \
		"$(TARGET)/fuzz/frames" tests/fuzz/corpus/frames -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

bench: build setup-broker setup-peers setup-bench ## compare with other libraries (ten minutes); writes tables and a plot
	$(BENCH)

bench-quick: build setup-broker setup-peers setup-bench ## like bench, in two minutes; only prints the tables
	$(BENCH) --quick

bench-programs: build setup-bench setup-broker ## measure served programs (five minutes); only prints the table
	tests/benches/programs.sh $(TARGET)/release

bench-cluster: build setup-broker ## measure a cluster of three nodes (15 minutes); only prints the table
	tests/benches/cluster.sh $(TARGET)/release

demo: build $(if $(AMQP_URL),,setup-broker) ## start a broker and a server, ask for fib(30), print the answer, stop both
	tests/demo.sh $(TARGET)/release

picture: build setup-broker setup-picture ## record the picture of README.md again
	TERMTOSVG=$(TARGET)/peers/picture/bin/termtosvg tests/picture.sh $(TARGET)/release tests/picture.svg

broker: setup-broker ## start a private RabbitMQ and print its URL (PORT=5672 for the default port)
	@url=$$(tests/broker.sh start "$(BROKER_DIR)" $(PORT)) && echo "export AMQP_URL=$$url"

broker-stop: ## stop that RabbitMQ
	@tests/broker.sh stop "$(BROKER_DIR)"

cluster: setup-broker ## start a private cluster of three nodes and print their URLs
	@urls=$$(tests/broker.sh cluster start "$(CLUSTER_DIR)") && set -- $$urls && \
		echo "export AMQP_URL=$$1; # node 1; all nodes: --url $$1 --url $$2 --url $$3"

cluster-stop: ## stop that cluster
	@tests/broker.sh cluster stop "$(CLUSTER_DIR)"

generate: setup-build ## generate man pages and shell completions, in target/share
	cargo run --release --locked --quiet -p rpc-generate -- $(TARGET)/share

install: ## install both programs, man pages, completions and the systemd unit below PREFIX (/usr/local)
	@# under sudo it does not build: root may have no cargo, or another version
	@if [ -z "$$SUDO_UID" ] && command -v cargo >/dev/null; then $(MAKE) build generate; fi
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(TARGET)/release/rpc-server $(TARGET)/release/rpc-client "$(DESTDIR)$(PREFIX)/bin"
	cd $(TARGET)/share && find . -type f -exec install -D -m 644 "{}" "$(DESTDIR)$(PREFIX)/share/{}" \;
	install -d "$(UNITS)"
	sed 's|/usr/bin/|$(PREFIX)/bin/|' "rpc-server/packaging/$(UNIT)" >"$(UNITS)/$(UNIT)"
	chmod 644 "$(UNITS)/$(UNIT)"
	@case ":$$PATH:" in *":$(PREFIX)/bin:"*) ;; *) echo '$(PREFIX)/bin is not on your PATH: export PATH="$(PREFIX)/bin:$$PATH"' ;; esac

uninstall: ## remove what is installed
	rm -f "$(DESTDIR)$(PREFIX)/bin/rpc-server" "$(DESTDIR)$(PREFIX)/bin/rpc-client" "$(UNITS)/$(UNIT)"
	cd $(TARGET)/share && find . -type f -exec rm -f "$(DESTDIR)$(PREFIX)/share/{}" \;

deb: setup-deb ## build a Debian package of all that, in target/debian
	rm -rf "$(TARGET)/debian"
	umask 022 && $(MAKE) install DESTDIR="$(abspath $(TARGET))/debian/root" PREFIX=/usr
	rpc-server/packaging/deb.sh "$(TARGET)/debian"

clean: broker-stop cluster-stop ## remove all build results
	cargo clean

setup-build:
	@tests/setup.sh build

setup-broker:
	@tests/setup.sh broker

setup-brokers:
	@tests/setup.sh brokers

setup-deb:
	@tests/setup.sh deb

setup-container:
	@tests/setup.sh container

setup-peers:
	@tests/setup.sh peers

setup-bench:
	@tests/setup.sh bench

setup-deps:
	@tests/setup.sh deps

setup-fuzz:
	@tests/setup.sh fuzz

setup-picture:
	@tests/setup.sh picture
