# Thin: each target calls a script, and says nothing the script doesn't. ARGS are passed on: make serve ARGS="--port 9000"
.PHONY: help serve test check bench
.DEFAULT_GOAL := help

help:
	@echo "make serve   install what is missing and serve the demo model on http://127.0.0.1:8000/v1"
	@echo "make test    install the development tools and run the tests"
	@echo "make check   format, lint, types, import contracts, stale documents, Dockerfile, scripts"
	@echo "make bench   check this server against transformers, then compare their speed (see benchmarks/README.md)"
	@echo "Arguments go through ARGS: make serve ARGS=\"/models/llava-1.5-7b-hf --port 9000\""

serve:
	@scripts/serve $(ARGS)

test:
	@scripts/test $(ARGS)

check:
	@scripts/check $(ARGS)

bench:
	@scripts/bench $(ARGS)
