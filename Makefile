# The targets that people, pre-commit and CI share. `make check` before a commit, `make ci` before a change lands.
.PHONY: check format lint types tests slow browser docs-code durations ci

check: format lint types tests
format:
	ruff check --fix-only --quiet . && ruff format .
lint:
	ruff check . && ruff format --check .
types:
	mypy
tests:
	pytest
slow:
	pytest -m slow
browser:
	pytest -m browser
docs-code:
	pytest tests/test_documentation.py
durations:
	pytest -q --durations=25 --durations-min=0.5
ci:
	.ci/run
