# The commands of this project. `make` alone lists them.

PYTHON := .venv/bin/python
VOTES ?= 1000
ROLES := tests/integration/test_few_rights.py # tests of what roles are refused, which test-attack runs
SCHEDULES ?= 1000
SEED ?= 1
WORKERS ?= 1
HA_WORKERS ?= 3

# The interpreter that .venv is made with: the first one here that is new enough.
BASE_PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)

COMPOSE = $$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.PHONY: help install demo demo-live run test test-unit test-pythons test-debian13 test-deploy test-integration test-attack test-browser test-clients test-verifier \
	test-replay screenshots test-faults test-ha test-ha-mutants test-failover soak-ha model test-mutants test-outages image-test soak count-many bench bench-page bench-paint bench-seal lint lock services-up services-down \
	docker-compose-up docker-compose-down docker-compose-secrets docker-is-here docker-test settings publish-test-votes check-db reconcile seal verify certify \
	results metrics clean
.DEFAULT_GOAL := help

help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: .venv/installed settings ## make .venv with all packages, and .env and random passwords where none stand

demo: install ## see 1,000 votes go through private servers and come out as totals (under a minute)
	@$(PYTHON) -m scripts.demo

demo-live: install ## the results page with 50 votes a second coming in, on private servers, until Ctrl-C
	@$(PYTHON) -m scripts.demo_live

run: install ## the service in the foreground on the local servers, until Ctrl-C
	@$(PYTHON) -m scripts.run_local

test: install ## unit, deployment and integration tests, on private servers of their own, without test-attack (ARGS="-k name")
	@$(PYTHON) -m pytest tests/unit tests/deploy tests/integration --ignore $(ROLES) $(ARGS)

test-unit: install ## unit tests: seconds, no server
	@$(PYTHON) -m pytest tests/unit $(ARGS)

test-pythons: install ## unit tests and verdicts on each supported Python that can be had (root, Debian; ARGS="3.11 3.13")
	@$(PYTHON) -m scripts.pythons $(ARGS)

test-debian13: install ## unit, integration and fault tests on Debian 13, in a tree made by debootstrap (root, Debian; ARGS="tests/unit -k name")
	@$(PYTHON) -m scripts.debian trixie $(ARGS)

test-integration: install ## tests against a real RabbitMQ and a real PostgreSQL
	@$(PYTHON) -m pytest tests/integration $(ARGS)

test-faults: install ## the fault suite: moments, single faults, mutants, 20 random schedules (about 10 minutes)
	@$(PYTHON) -m pytest tests/faults $(ARGS)

test-mutants: install ## broken services, and the scenario that finds each
	@$(PYTHON) -m pytest -q tests/faults/test_mutants.py $(ARGS)

test-outages: install ## database, broker and both away for OUTAGE_SECONDS=60
	@OUTAGE_SECONDS=$${OUTAGE_SECONDS:-60} $(PYTHON) -m pytest -q tests/faults/test_outages.py $(ARGS)

image-test: install ## build the image without Docker, run it against private servers (root; about 3 minutes)
	@$(PYTHON) -m pytest -q -s tests/image $(ARGS)

docker-test: install ## the stack of docker-compose.yml on a Docker engine of its own (root; Debian; ARGS="-m core")
	@$(PYTHON) -m pytest -q -s tests/docker $(ARGS)

test-ha: install ## several brokers and databases: cluster, standby, failover, pooler, their mutants (about 6 minutes)
	@$(PYTHON) -m pytest tests/ha -n $(HA_WORKERS) $(ARGS)

test-ha-mutants: install ## services broken in ways that only several servers can show (about 5 minutes)
	@HA_MUTANTS=all $(PYTHON) -m pytest -q tests/ha/test_mutants.py $(ARGS)

test-failover: install ## how long each form of several servers takes to fail over (FAILOVER_TRIALS=5)
	@FAILOVER_TRIALS=$${FAILOVER_TRIALS:-5} $(PYTHON) -m pytest -q tests/ha/test_failover.py -k goes_to -s $(ARGS)

soak-ha: install ## SCHEDULES=1000 random fault schedules from SEED=1 on a cluster of brokers and a pair of databases
	@$(PYTHON) -m tests.faults.soak --ha --schedules $(SCHEDULES) --seed $(SEED) --workers $(WORKERS)

model: ## the model of the protocol, and its broken variants, checked by spin (Debian: spin, gcc)
	@$(BASE_PYTHON) docs/model/check.py

soak: install ## SCHEDULES=1000 random fault schedules from SEED=1, with a report in .local/soak/report.json
	@$(PYTHON) -m tests.faults.soak --schedules $(SCHEDULES) --seed $(SEED) --workers $(WORKERS)

count-many: install ## a million votes by three replicas, then reconciled, sealed and verified (some minutes)
	@$(PYTHON) -m scripts.count_many $(ARGS)

bench: install ## speed, CPU, memory and latency against bare pika and a node peer (about 20 minutes; ARGS=--quick: two)
	@$(PYTHON) -m bench $(ARGS)

test-replay: install ## the audit log of 100,000 votes exported and published again (REPLAY_VOTES=100000)
	@REPLAY_VOTES=$${REPLAY_VOTES:-100000} $(PYTHON) -m pytest -q tests/integration/test_reconcile.py -k replay_of_many

test-attack: install ## what somebody with rights of their own may try against the count and its proof
	@$(PYTHON) -m pytest tests/attack $(ROLES) $(ARGS)

test-clients: install .venv/clients/installed ## votes of kombu, aio-pika, node's amqplib and amqp-publish (Debian: npm, amqp-tools)
	@$(PYTHON) -m pytest tests/clients $(ARGS)

test-verifier: install ## the verifier in Node, after docs/VERIFY.md, against ours (Debian: nodejs)
	@$(PYTHON) -m pytest tests/verifier $(ARGS)

test-browser: install .venv/axe/installed ## the results page in a real browser (Debian's chromium and chromium-driver)
	@$(PYTHON) -m pytest tests/browser $(ARGS)

bench-page: install ## what 200 open results pages cost the count, in paired drains (ARGS="--pairs 10")
	@$(PYTHON) -m bench.page_load $(ARGS)

bench-paint: install ## how fast the page paints and updates 1,000 laws in a browser
	@$(PYTHON) -m bench.page_paint $(ARGS)

bench-seal: install ## what sealing costs, in paired drains, and how long a million votes take to verify
	@$(PYTHON) -m bench.sealing $(ARGS)

screenshots: install ## the pictures of the results page in docs/, made anew
	@$(PYTHON) -m scripts.screenshots

test-deploy: install ## each check of the deployment files, on a broken copy
	@$(PYTHON) -m pytest tests/deploy $(ARGS)

lint: install ## ruff, mypy, and each deployment file by the tool that reads it
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m scripts.check_deploy

lock: install ## requirements*.lock anew from requirements*.txt, with hashes (ARGS=--upgrade: what they bring with them, too)
	@for name in requirements requirements-dev; do \
		.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
			--custom-compile-command "make lock" $(ARGS) $$name.txt --output-file $$name.lock || exit 1; done

services-up: install ## start the local RabbitMQ and PostgreSQL (data in .local)
	@$(PYTHON) scripts/local_services.py up

services-down: install ## stop them and remove their data
	@$(PYTHON) scripts/local_services.py down

docker-compose-up: .env docker-is-here ## build and start the whole stack with Docker (REPLICAS=3; else as many as run)
	@$(BASE_PYTHON) -m scripts.write_env --check
	@running=$$($(COMPOSE) ps -q aggregator 2>/dev/null | wc -l); \
	replicas=$${REPLICAS:-$$((running > 0 ? running : 1))}; \
	$(COMPOSE) up --build --detach --scale aggregator=$$replicas || { \
		echo "not all of the stack is up; what database-setup said last:" >&2; \
		$(COMPOSE) logs --tail 5 database-setup >&2; exit 1; }

docker-compose-down: docker-is-here ## stop that stack, with all profiles; its data stays
	@$(COMPOSE) --profile alerting --profile exporters --profile audit down

docker-compose-secrets: .env ## move passwords that stand in .env into files of their own, which Compose reads
	@$(BASE_PYTHON) -m scripts.write_env --move

docker-is-here:
	@docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null \
	|| { echo "neither 'docker compose' nor 'docker-compose' is installed" >&2; exit 1; }

publish-test-votes: install ## publish VOTES=1000 test votes (ARGS="--duplicates 10 --rate 500")
	@$(PYTHON) test_publisher.py -n $(VOTES) $(ARGS)

check-db: install ## totals, duplicates and rejected messages in the database
	@$(PYTHON) -m scripts.check_db

reconcile: install ## the totals against the audit log (ARGS="--json", ARGS="--recount --all")
	@$(PYTHON) reconcile.py $(ARGS)

seal: install ## seal what was counted and print the newest seal
	@$(PYTHON) reconcile.py seal $(ARGS)

verify: install ## compute the sealed audit log anew (ARGS="--since NUMBER:HASH")
	@$(PYTHON) reconcile.py verify $(ARGS)

certify: install ## make the result of the closed law LAW final
	@$(PYTHON) reconcile.py certify $(LAW) $(ARGS)

results: install ## the results, law by law (ARGS="--json" or "--csv")
	@$(PYTHON) reconcile.py results $(ARGS)

metrics: install ## what the running service shows to Prometheus
	@$(PYTHON) -m scripts.show_metrics

clean: ## stop the local servers; remove their data, .venv and all caches
	@if [ -d .local ]; then $(BASE_PYTHON) scripts/local_services.py down; fi
	@rm -rf .venv .local .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.env settings:
	@$(BASE_PYTHON) -m scripts.write_env

.venv/installed: requirements-dev.lock
	@[ -n "$(BASE_PYTHON)" ] || { echo "Python 3.11 or later is needed, and no python3 on PATH is" >&2; exit 1; }
	@echo "installing the packages into .venv ..."
	@$(BASE_PYTHON) -m venv .venv >/dev/null 2>&1 || $(BASE_PYTHON) -m virtualenv -q .venv 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null \
			&& $(BASE_PYTHON) -m venv .venv; \
		else false; fi; } || { \
		rm -rf .venv; \
		echo "$(BASE_PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --root-user-action ignore \
		--require-hashes -r requirements-dev.lock
	@touch $@

# What tests need from npm, in the versions that the lock file of their folder names; beside it in .venv.
npm_ci = if command -v npm >/dev/null; then \
		mkdir -p $(@D) && cp $(1)/package.json $(1)/package-lock.json $(@D)/ \
		&& (cd $(@D) && npm ci --loglevel=error --ignore-scripts --no-audit --no-fund >/dev/null) && touch $@; \
	elif [ -n "$$CI" ]; then echo "npm is needed: it brings $(2)" >&2; exit 1; \
	else echo "no npm here: the tests $(3) are skipped" >&2; fi

.venv/axe/installed: tests/browser/package.json tests/browser/package-lock.json .venv/installed
	@$(call npm_ci,tests/browser,axe-core,of accessibility)

.venv/clients/installed: tests/clients/package.json tests/clients/package-lock.json .venv/installed
	@$(call npm_ci,tests/clients,amqplib,with node)
