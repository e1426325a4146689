# SPDX-License-Identifier: LGPL-2.1-or-later
#
#   make          .venv, with .venv/bin/loopd and .venv/bin/loopctl run from this checkout
#   make demo     the main job on a private bus, with real loop devices and polkit
#   make check    all tests and linters
#   make install  onto this system, or below DESTDIR

PREFIX  ?= /usr/local
DESTDIR ?=

# Debian's own, whatever stands first on PATH: the libraries are built for it.
PYTHON ?= /usr/bin/python3
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo -E)

# What each step needs of Debian. Python's tools that are not here come from the package index.
RUN_PACKAGES   := python3-venv python3-setuptools python3-wheel \
                  python3-dbus-next python3-pyudev python3-systemd
DEMO_PACKAGES  := dbus polkitd udev mount util-linux e2fsprogs python3-gi
CHECK_PACKAGES := $(DEMO_PACKAGES) systemd libglib2.0-bin libxml2-utils shellcheck

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := .venv/bin/python -m pip install --retries 1 --no-build-isolation >.venv/pip.log 2>&1
CHECK_EXTRAS := [fast,check]

.PHONY: all demo check lint bench deps run-deps demo-deps check-deps install uninstall clean

all: .venv/run

demo: .venv/run | demo-deps
	$(SUDO) .venv/bin/python -m tests.demo

check: .venv/check
	$(SUDO) .venv/bin/python -m pytest

lint: .venv/check
	.venv/bin/python -m pytest -m lint

bench: .venv/check
	$(SUDO) .venv/bin/python -m bench

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
run-deps:   ; $(call need,$(RUN_PACKAGES))
demo-deps:  ; $(call need,$(DEMO_PACKAGES))
check-deps: ; $(call need,$(CHECK_PACKAGES))

define need
@command -v dpkg-query >/dev/null || { echo 'make: not Debian; going on without looking for: $(1)'; exit 0; }; \
have=" $$(dpkg-query -W -f '$${db:Status-Status}/$${Package} ' $(1) 2>/dev/null) "; missing=; \
for package in $(1); do \
	case $$have in *" installed/$$package "*) ;; *) missing="$$missing $$package" ;; esac; \
done; \
[ -z "$$missing" ] || { \
	echo "make: installing Debian packages:$$missing"; \
	$(SUDO) apt-get update -qq && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
}
endef

clean:
	$(SUDO) rm -rf .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	$(SUDO) find . -name __pycache__ -type d -prune -exec rm -rf {} +
