# SPDX-License-Identifier: LGPL-2.1-or-later
#
#   make          .venv, with .venv/bin/loopd and .venv/bin/loopctl run from this checkout
#   make demo     the main job on a private bus, with real loop devices and polkit
#   make check    all tests and linters
#   make kernels  the same package under Debian 12's and Debian 13's own kernels, emulated
#   make kernels-smoke  the most telling of these tests, under Debian 12's
#   make bench    what it costs, beside losetup and udisks2
#   make install  onto this system, or below DESTDIR
#   make man      the manual pages, in build/man
#   make deb      build/loopd_VERSION_all.deb, a package for Debian 12 and newer

DESTDIR ?=
PREFIX  ?= /usr/local

# Debian's own, whatever stands first on PATH: the libraries are built for it.
PYTHON ?= /usr/bin/python3
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo -E)

# What each step needs of Debian. Python's tools that are not here come from the package index.
LIBRARIES        := python3-dbus-next python3-pyudev python3-rich python3-systemd
RUN_PACKAGES     := $(LIBRARIES) python3-venv python3-setuptools python3-wheel
INSTALL_PACKAGES := $(LIBRARIES) dbus polkitd udev python3-docutils
DEMO_PACKAGES    := $(LIBRARIES) dbus polkitd udev mount util-linux e2fsprogs python3-gi
DEB_PACKAGES     := debhelper dh-apparmor dh-python python3-docutils
# To build and run what is in examples/: a compiler and headers, a toolkit, a screen for it.
EXAMPLE_PACKAGES := gcc libc6-dev pkg-config libsystemd-dev libglib2.0-dev gir1.2-gtk-4.0 xvfb
CHECK_PACKAGES   := $(DEMO_PACKAGES) $(DEB_PACKAGES) systemd libglib2.0-bin libxml2-utils btrfs-progs shellcheck strace git \
                    lintian apparmor groff-base udisks2 fdisk xorriso zsh fish mmdebstrap gpg debian-archive-keyring \
                    bzip2 lz4 xz-utils zstd qemu-utils systemd-container dbus-broker $(EXAMPLE_PACKAGES)
# Beside those.
KERNELS_PACKAGES := qemu-system-x86
BENCH_PACKAGES   := fio

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := .venv/bin/python -m pip install --retries 1 --no-build-isolation >.venv/pip.log 2>&1
CHECK_EXTRAS := [fast,check]

.PHONY: all demo check lint kernels kernels-smoke bench install install-files uninstall man picture deb clean \
        deps run-deps install-deps demo-deps deb-deps check-deps kernels-deps bench-deps

all: .venv/run

demo: .venv/run | demo-deps
	$(SUDO) .venv/bin/python -m tests.demo

check: .venv/check
	$(SUDO) .venv/bin/python -m pytest -n 2 --no-loadscope-reorder

lint: .venv/check
	.venv/bin/python -m pytest -m lint

# One machine at a time.
kernels: .venv/check | kernels-deps
	$(SUDO) .venv/bin/python -m pytest tests/kernel

kernels-smoke: .venv/check | kernels-deps
	$(SUDO) .venv/bin/python -m pytest tests/kernel -m smoke -k bookworm

# In the end: .venv/bin/python -m bench.document build/bench.json
bench: .venv/check | bench-deps
	$(SUDO) .venv/bin/python -m bench -o build/bench.json

# The two stamps: after the first, the program runs; after the second, its tests do.

.venv/run: pyproject.toml | run-deps
	$(PYTHON) -m venv --system-site-packages .venv
	@$(PIP_INSTALL) -e . || $(no_pip)
	@touch $@

.venv/check: .venv/run | check-deps
	@$(PIP_INSTALL) -e '.$(CHECK_EXTRAS)' || $(no_pip)
	@touch $@

# One line instead of pip's forty.
no_pip = { echo 'make: pip could not fetch what .venv needs: is the package index reachable? (.venv/pip.log says more)' >&2; exit 1; }

# Debian packages: nothing is asked of the network unless one is missing.

deps: run-deps check-deps
run-deps:     ; $(call need,$(RUN_PACKAGES))
install-deps: ; $(call need,$(INSTALL_PACKAGES))
demo-deps:    ; $(call need,$(DEMO_PACKAGES))
deb-deps:     ; $(call need,$(DEB_PACKAGES))
check-deps:   ; $(call need,$(CHECK_PACKAGES))
kernels-deps: ; $(call need,$(KERNELS_PACKAGES))
bench-deps:   ; $(call need,$(BENCH_PACKAGES))

define need
@command -v dpkg-query >/dev/null || { echo 'make: not Debian; going on without looking for: $(1)'; exit 0; }; \
have=" $$(dpkg-query -W -f '$${db:Status-Status}/$${Package} ' $(1) 2>/dev/null) "; missing=; \
for package in $(1); do \
	case $$have in *" installed/$$package "*) ;; *) missing="$$missing $$package" ;; esac; \
done; \
[ -z "$$missing" ] || { \
	echo "make: installing Debian packages:$$missing"; \
	$(SUDO) apt-get update -qq && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
}
endef

# Below PREFIX, but for what the bus and polkit look for in one place only.

bindir       := $(PREFIX)/bin
sbindir      := $(PREFIX)/sbin
packagedir   := $(PREFIX)/lib/loopd
unitdir      := $(PREFIX)/lib/systemd/system
rulesdir     := $(PREFIX)/lib/udev/rules.d
dbusdir      := $(PREFIX)/share/dbus-1
mandir       := $(PREFIX)/share/man
PAGES        := $(basename $(notdir $(wildcard docs/man/*.rst)))
bashdir      := $(PREFIX)/share/bash-completion/completions
fishdir      := $(PREFIX)/share/fish/vendor_completions.d
zshdir       := $(PREFIX)/share/zsh/site-functions
buspolicydir := /usr/share/dbus-1/system.d
polkitdir    := /usr/share/polkit-1

install: install-files
	# In the unit's sandbox nobody could keep what Python compiled.
	umask 022; $(PYTHON) -m compileall -q $(if $(DESTDIR),-s $(DESTDIR)) $(DESTDIR)$(packagedir)/loopd
	$(reload)

# What a package holds, too, where the system's own tools do the rest.
install-files: | $(if $(DESTDIR),,install-deps)
	rm -rf $(DESTDIR)$(packagedir)
	umask 022; mkdir -p $(addprefix $(DESTDIR),$(bindir) $(sbindir) $(packagedir)/loopd $(unitdir) $(rulesdir) \
		$(dbusdir)/interfaces $(dbusdir)/system-services $(buspolicydir) $(polkitdir)/actions $(polkitdir)/rules.d \
		$(mandir) $(bashdir) $(fishdir) $(zshdir))
	install -m 644 dbus/org.example.Loop1.xml $(DESTDIR)$(packagedir)/loopd
	umask 022; for package in $$(find loopd -name __init__.py -printf '%h\n'); do \
		install -m 644 -D -t $(DESTDIR)$(packagedir)/$$package $$package/*.py; done
	install -m 644 loopd/py.typed $(DESTDIR)$(packagedir)/loopd
	$(call launcher,__main__,$(sbindir)/loopd)
	$(call launcher,cli,$(bindir)/loopctl)
	$(call fill,dbus/org.example.Loop1.service.in,$(dbusdir)/system-services/org.example.Loop1.service)
	$(call fill,systemd/loopd.service.in,$(unitdir)/loopd.service)
	$(call fill,systemd/loop-attach@.service.in,$(unitdir)/loop-attach@.service)
	install -m 644 dbus/org.example.Loop1.xml $(DESTDIR)$(dbusdir)/interfaces
	install -m 644 dbus/org.example.Loop1.conf $(DESTDIR)$(buspolicydir)
	install -m 644 polkit/org.example.loop1.policy $(DESTDIR)$(polkitdir)/actions
	$(call fill,polkit/org.example.loop1.rules.in,$(polkitdir)/rules.d/org.example.loop1.rules)
	install -m 755 polkit/image-owner $(DESTDIR)$(packagedir)
	install -m 644 systemd/*.rules $(DESTDIR)$(rulesdir)
	install -m 644 loopd/cli/completion/loopctl.bash $(DESTDIR)$(bashdir)/loopctl
	install -m 644 loopd/cli/completion/loopctl.fish $(DESTDIR)$(fishdir)
	install -m 644 loopd/cli/completion/loopctl.zsh $(DESTDIR)$(zshdir)/_loopctl
	umask 022; $(PYTHON) docs/man/pages.py $(DESTDIR)$(mandir)

uninstall:
	rm -rf $(DESTDIR)$(packagedir)
	rm -f $(addprefix $(DESTDIR),$(sbindir)/loopd $(bindir)/loopctl \
		$(dbusdir)/system-services/org.example.Loop1.service $(unitdir)/loopd.service $(unitdir)/loop-attach@.service \
		$(dbusdir)/interfaces/org.example.Loop1.xml $(buspolicydir)/org.example.Loop1.conf \
		$(foreach page,$(PAGES),$(mandir)/man$(lastword $(subst ., ,$(page)))/$(page)) \
		$(bashdir)/loopctl $(fishdir)/loopctl.fish $(zshdir)/_loopctl \
		$(polkitdir)/actions/org.example.loop1.policy $(polkitdir)/rules.d/org.example.loop1.rules \
		$(addprefix $(rulesdir)/,$(notdir $(wildcard systemd/*.rules))))
	$(reload)

# To look at them: man -l build/man/man1/loopctl.1
man:
	$(PYTHON) docs/man/pages.py build/man

# README's, of what is run for it.
picture: .venv/run | demo-deps
	$(SUDO) .venv/bin/python docs/picture.py

# -I: a root daemon takes no module from the environment, the user or the working directory.
define launcher
@printf '%s\n' '#!$(PYTHON) -I' 'import sys' 'sys.path.insert(0, "$(packagedir)")' \
	'from loopd.$(1) import main' 'sys.exit(main())' >$(DESTDIR)$(2)
@chmod 755 $(DESTDIR)$(2)
endef

define fill
@sed 's|@sbindir@|$(sbindir)|; s|@bindir@|$(bindir)|; s|@packagedir@|$(packagedir)|' $(1) >$(DESTDIR)$(2)
@chmod 644 $(DESTDIR)$(2)
endef

# They would see it by themselves, but not at once. Where one of them does not run it sees it later.
define reload
@[ -n '$(DESTDIR)' ] || { \
	systemctl daemon-reload; udevadm control --reload; \
	dbus-send --system --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ReloadConfig; \
} >/dev/null 2>&1 || true
endef

# The package is built in a copy, because what builds it leaves its files in and beside the tree. With
# VERSION=0.1.0+test1 it is made of the same files as another version.
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' loopd/__init__.py)
copy    := build/deb/loopd

deb: | deb-deps
	@rm -rf build/deb && mkdir -p $(copy)
	@sed '/^#/d; s|^/|./|; s|/$$||' .gitignore >build/deb/ignored
	@tar -c --exclude-vcs --exclude-from=build/deb/ignored \
		--mtime="@$$(dpkg-parsechangelog --show-field Timestamp)" . | tar -x -C $(copy)
	@sed -i '1s/([^)]*)/($(VERSION))/' $(copy)/debian/changelog
	@sed -i 's/^\(__version__\|version\) = ".*"/\1 = "$(VERSION)"/' $(copy)/loopd/__init__.py $(copy)/pyproject.toml
	@cd $(copy) && umask 022 && \
		dpkg-buildpackage --build=binary --no-check-builddeps --no-pre-clean --no-sign >../log 2>&1 || \
		{ cat ../log >&2; exit 1; }
	@mv build/deb/loopd_$(VERSION)_all.deb build
	@echo build/loopd_$(VERSION)_all.deb

# What ran as root has left its caches.
clean:
	$(SUDO) rm -rf .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	$(SUDO) find . -name __pycache__ -type d -prune -exec rm -rf {} +
