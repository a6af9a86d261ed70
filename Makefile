# SPDX-License-Identifier: Apache-2.0
# One command for each habit. Each installs what it needs, says so, and needs no network the second
# time: Debian packages by apt-get, Python packages into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find postcopyd examples -name '*.[ch]' -o -name '*.py' -o -name '*.varlink') \
  meson.build pyproject.toml README.md LICENSE
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := dist/postcopyd-$(VERSION)-cp311-abi3-linux_x86_64.whl
MAN := $(patsubst man/%.rst,.build/man/%,$(wildcard man/*.rst))
DEB := .build/deb/postcopyd_$(VERSION)_amd64.deb
# meson and ninja are programs of the venv; the build looks for them by name.
export PATH := $(abspath $(BIN)):$(PATH)

BUILD_PACKAGES := gcc libc6-dev libssl-dev make pkg-config python3-venv
GUEST_PACKAGES := qemu-system-x86 linux-image-cloud-amd64
DEB_PACKAGES := debhelper dh-python
TEST_PACKAGES := $(GUEST_PACKAGES) clang libclang-rt-14-dev systemd-container iproute2 \
  busybox-static ovmf swtpm
# Of `test-long` and `test-libvirt` only: libvirt's daemon, which is not started on this machine; and
# what makes a Debian with the newest one.
LIBVIRT_PACKAGES := libvirt-daemon-system libvirt-clients python3-libvirt
NEWEST_PACKAGES := mmdebstrap

.PHONY: all build demo test test-long test-libvirt chaos fuzz bench bench-quick wheel sdist man deb check gen fmt clean
all: build

build: $(VENV)/.built

$(VENV)/.tools: pyproject.toml
	@tools/debian-packages $(BUILD_PACKAGES)
	@echo "Python packages for building and testing go to $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/requirements.py build dev package > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.built: $(WHEEL)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(WHEEL)
	@touch $@

wheel: $(WHEEL)

$(WHEEL): $(VENV)/.tools $(SOURCES)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist .
	@touch $@

demo: build
	@tools/debian-packages $(GUEST_PACKAGES)
	$(BIN)/postcopyd demo
	$(BIN)/postcopyd demo --guest qemu

# What has to take long: two more versions of QEMU under every guest, two hosts with systemd, domains
# of libvirt, chaos.
# All else is `test`. TESTS names folders, files or tests.
test: WHICH := "not long" --dist=worksteal --numprocesses=4
# In the order of the folders, so that what takes longest, the kernels, begins early.
test-long: WHICH := "long and not libvirt" --dist=loadfile --no-loadscope-reorder --numprocesses=3
# All of libvirt's domains, also what takes libvirt's daemon away from them: 9.0 crashes now and then.
test-libvirt: WHICH := long
test-libvirt: TESTS := tests/system/test_libvirt.py tests/hosts/test_first_guest.py tests/hosts/test_virsh.py
test-long test-libvirt: TEST_PACKAGES += $(LIBVIRT_PACKAGES)
test-long test-libvirt: newest-libvirt
test test-long test-libvirt: build deb
	@tools/debian-packages $(TEST_PACKAGES)
	@tools/newest-qemu
	$(BIN)/pytest -q -m $(WHICH) $(TESTS)

.PHONY: newest-libvirt
newest-libvirt: build deb
	@tools/debian-packages $(NEWEST_PACKAGES)
	@tools/newest-libvirt $(WHEEL)

# The daemons that are upgraded in tests.
.PHONY: version-before
test-long: version-before
version-before: build
	@tools/version-before

# A guest that is moved again and again while everything around it breaks: tests/chaos/chaos.py.
chaos: SEED := 1
chaos: SECONDS := 600
chaos: build
	@tools/debian-packages $(GUEST_PACKAGES) iproute2
	@tools/newest-qemu
	PYTHONPATH=tests $(BIN)/python tests/chaos/chaos.py --seed $(SEED) --seconds $(SECONDS) $(CHAOS)

# What a peer or a client may send, thought up under sanitizers, each target for so long; KEEP=--keep
# merges what is new into tests/fuzz/corpus.
fuzz: SECONDS := 60
fuzz: build
	@tools/debian-packages $(TEST_PACKAGES)
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(KEEP)

# All measures, some 35 minutes, and the pictures; and the same with few runs, in less than 5. What
# the rows mean: bench/README.md. A goal missed (status 3)
# is shown and no reason to stop; anything else is, a wrong page above all.
BENCH := $(BIN)/python bench
bench: bench-needs
	$(BENCH)/engine_vs_floor.py || [ $$? = 3 ]
	$(BENCH)/qemu.py || [ $$? = 3 ]
	$(BENCH)/private.py || [ $$? = 3 ]
	$(BENCH)/dirty.py || [ $$? = 3 ]
	$(BENCH)/first_access.py || [ $$? = 3 ]
	$(BENCH)/hybrid.py || [ $$? = 3 ]
	$(BENCH)/blackout.py || [ $$? = 3 ]
	$(BENCH)/link.py || [ $$? = 3 ]
	$(BENCH)/restart.py || [ $$? = 3 ]
	$(BENCH)/charts.py
	$(BENCH)/table.py engine qemu private dirty first_access hybrid blackout link restart

bench-quick: export BENCH_RESULTS := .build/bench
bench-quick: bench-needs
	$(BENCH)/engine_vs_floor.py --rounds 3 --mb 128 || [ $$? = 3 ]
	$(BENCH)/qemu.py --runs 2 --watch 2 || [ $$? = 3 ]
	$(BENCH)/private.py --runs 2 --watch 2 --memory 512 --test-mb 256 || [ $$? = 3 ]
	$(BENCH)/dirty.py --rounds 1 --looks 3 || [ $$? = 3 ]
	$(BENCH)/first_access.py --rounds 2 || [ $$? = 3 ]
	$(BENCH)/hybrid.py --runs 1 --watch 2 --skip devices --skip postcopy \
	  --skip "quiet qemu" || [ $$? = 3 ]
	$(BENCH)/blackout.py --runs 1 || [ $$? = 3 ]
	$(BENCH)/link.py --rounds 1 --trips 0,1 || [ $$? = 3 ]
	$(BENCH)/charts.py
	$(BENCH)/table.py engine qemu private dirty first_access hybrid blackout link

# The same domain moved by postcopyd and by virsh, between the same two libvirtd.
.PHONY: bench-libvirt
bench-libvirt: bench-needs
	@tools/debian-packages $(LIBVIRT_PACKAGES)
	$(BENCH)/libvirt.py

.PHONY: bench-needs
bench-needs: build $(VENV)/.bench
	@tools/debian-packages $(GUEST_PACKAGES) iproute2
	@tools/newest-qemu

$(VENV)/.bench: $(VENV)/.tools
	@echo "Python packages for the pictures go to $(VENV)"
	$(BIN)/python tools/requirements.py bench > $(VENV)/bench.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(VENV)/bench.txt
	@touch $@

# Of what git has.
sdist: $(VENV)/.tools
	$(BIN)/python -c 'import mesonpy; print("dist/" + mesonpy.build_sdist("dist"))'

man: $(MAN)

.build/man/%: man/%.rst $(VENV)/.tools
	@mkdir -p .build/man
	sed 's/@VERSION@/$(VERSION)/' $< | $(BIN)/rst2man --strict - $@

deb: $(DEB)

$(DEB): $(WHEEL) $(MAN) $(wildcard tools/deb* tools/debian/* tools/*.py docs/* examples/* systemd/*) CHANGELOG.md
	@tools/debian-packages $(DEB_PACKAGES)
	tools/deb $(WHEEL)

check: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/protocol-tables --check

# What is written from other files: the tables of docs/PROTOCOL.md.
gen: build
	$(BIN)/python tools/protocol-tables

fmt: build
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .build dist .*_cache
