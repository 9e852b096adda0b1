# Pillion. `make help` lists the targets.

# Where go.dev's installer puts Go, which sudo takes out of PATH.
export PATH := $(PATH):/usr/local/go/bin
GO      ?= go
PREFIX  ?= /usr/local
DESTDIR ?=

# What building leaves: the binary here, the virtual machine's kernel in vm/.
BUILD   := build
PILLION := $(BUILD)/pillion

# A checkout of another user makes git refuse, and the build with it.
VCS     := $(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false)
# The keeper of survive: crash begins before the Go runtime does; see cmd/pillion/keeper.
KEEPER  := -E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry
GOBUILD := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=$(VCS) -ldflags=$(KEEPER)

# What has the race detector in it sleeps for a second before it exits, and tests
# start it hundreds of times. What is left is for a report that is being written.
export GORACE ?= atexit_sleep_ms=50

# Packages whose tests touch the kernel's global state (programs, cgroups,
# namespaces) run one at a time; the others run side by side.
KERNEL_PKGS := ./bpf/... ./loader/... ./cmd/pillion
BLACKBOX    := ./tests/...

# Tests on a node of their own, with the image that is shipped.
ONNODE := PILLION_REQUIRE_ROOT=1 PILLION=$(abspath $(PILLION)) PILLION_IMAGE=$(abspath $(BUILD)/image) $(GO) test -count=1 -v

.DEFAULT_GOAL := build
.PHONY: help build generate check format test test-unit test-kernel test-vm test-vm-arm64 test-kubernetes stress traps failure suites bench demo image install clean test-systemd test-containers test-kubelet test-cluster

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## compile build/pillion (needs Go alone)
	$(GOBUILD) -o $(PILLION) ./cmd/pillion

generate: ## compile the BPF programs again (needs clang-19)
	@scripts/setup.sh generate
	$(GO) generate ./bpf

check: ## format, vet, import rules, licences, freshness of generated files, shell
	@scripts/setup.sh check
	@scripts/check.sh

format: ## rewrite Go and C in the house's format
	gofmt -w $$(git ls-files '*.go')
	clang-format-19 -i $$(git ls-files 'bpf/*.c' 'bpf/include/*.h' 'bpf/tests/*.c')

test: ## everything but the virtual machine; as root, since it uses the kernel
	@[ "$$(id -u)" = 0 ] || { echo 'make test: needs root; make check and make test-unit do not' >&2; exit 1; }
	@scripts/setup.sh test
	$(MAKE) check build
	$(MAKE) test-unit test-kernel

test-unit: ## the tests that need no kernel, under the race detector
	$(GO) test -race $$($(GO) list ./... | grep -v -E '/(bpf|loader|tests)(/|$$)|/cmd/pillion$$')

test-kernel: build ## the tests that use the kernel and real programs (as root)
	$(GO) test -race -p 1 -count=1 -timeout 10m $$($(GO) list $(KERNEL_PKGS))
	@echo 'tests/kubelet, tests/cluster: skipped, they need a kubelet: make test-kubelet test-cluster'
	@[ -n "$$PILLION_KUBE_BIN" ] || echo 'tests/kubernetes: skipped, it needs an API server: make test-kubernetes'
	PILLION=$(abspath $(PILLION)) $(GO) test -p 1 -parallel 6 -count=1 -timeout 15m $(BLACKBOX)

test-vm: ## the attach tests on Debian's 6.1, the oldest supported kernel, in qemu
	@scripts/setup.sh vm
	scripts/vm-test.sh $(VM_PKGS)

test-vm-arm64: ## the kernel side, the keeper, take-overs and exec on an arm64 machine, emulated (an hour, if much else is running)
	@scripts/setup.sh vm arm64 generate
	VM_ARCH=arm64 scripts/vm-test.sh $(VM_PKGS)

test-kubernetes: build ## discovery against a real kube-apiserver and etcd (as root; built once, some minutes)
	bin=$$(scripts/kubernetes.sh) && PILLION_KUBE_BIN=$$bin PILLION=$(abspath $(PILLION)) $(GO) test -count=1 -v -timeout 10m ./tests/kubernetes

test-systemd: build ## the unit and the drop-in under a real systemd in a container (as root, some minutes)
	@scripts/setup.sh systemd
	root=$$(scripts/systemd.sh) && PILLION_SYSTEMD_ROOT=$$root PILLION=$(abspath $(PILLION)) $(GO) test -count=1 -v -timeout 15m ./tests/systemd

test-containers: ## the image in real pods: containerd over CRI, and podman (as root, two minutes)
	@scripts/setup.sh containers
	$(GO) run ./scripts/image -o $(BUILD)/image
	PILLION_IMAGE=$(abspath $(BUILD)/image) $(GO) test -count=1 -v -timeout 15m ./tests/containers

test-kubelet: build ## the manifests of deploy/ on a real kubelet and containerd (as root; built once, some minutes)
	@scripts/setup.sh node
	$(GO) run ./scripts/image -o $(BUILD)/image
	bin=$$(scripts/kubernetes.sh kubelet) && PILLION_KUBELET_BIN=$$bin $(ONNODE) -timeout 20m ./tests/kubelet

test-cluster: build ## webhook, discovery and rollouts in a whole cluster of one node (as root; built once, some minutes)
	@scripts/setup.sh node
	$(GO) run ./scripts/image -o $(BUILD)/image
	bin=$$(scripts/kubernetes.sh node) && PILLION_NODE_BIN=$$bin $(ONNODE) -timeout 20m ./tests/cluster

stress: build ## 5,000 connections for two minutes while endpoints come and go (as root)
	PILLION=$(abspath $(PILLION)) $(GO) test -count=1 -v -timeout 15m ./tests/model -run TestStress -stress 2m

suites: build ## other projects' test suites in full (as root, half an hour)
	@scripts/setup.sh test
	PILLION_REQUIRE_ROOT=1 PILLION_SUITES=long PILLION=$(abspath $(PILLION)) $(GO) test -v -count=1 -timeout 120m ./tests/suites

bench: build ## what a hop costs, and what none does, beside peers (as root, ten minutes to half an hour)
	@scripts/setup.sh bench
	PILLION=$(abspath $(PILLION)) $(GO) run ./tests/bench $(BENCHFLAGS)

traps: build ## the trap suite, also against HAProxy, nginx and Envoy: writes docs/traps.md (as root, some minutes)
	@scripts/setup.sh traps
	PILLION=$(abspath $(PILLION)) PILLION_TRAPS=$(abspath docs/traps.md) $(GO) test -count=1 -timeout 15m -run TestTraps ./tests/traps

failure: build ## what faults do to connections: writes docs/failure.md (as root, a minute)
	PILLION=$(abspath $(PILLION)) PILLION_FAILURE=$(abspath docs/failure.md) $(GO) test -count=1 -timeout 10m ./tests/failure

demo: build ## real programs, redirected and balanced (as root, under a minute)
	@scripts/setup.sh demo
	scripts/demo.sh $(PILLION)

image: ## write build/image.tar, the container image for amd64 and arm64, and test it (some minutes)
	@scripts/setup.sh image
	$(GO) run ./scripts/image -o $(BUILD)/image
	PILLION_IMAGE=$(abspath $(BUILD)/image) $(GO) test -count=1 -v ./scripts/image

install: ## copy build/pillion below DESTDIR and PREFIX (make build first)
	install -D -m 0755 $(PILLION) $(DESTDIR)$(PREFIX)/bin/pillion

clean: ## remove what building leaves
	rm -rf $(BUILD)
