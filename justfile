# Shortcuts; `just` without arguments lists them. Nothing here is needed: each line is a plain command.

default:
    @just --list

# Everything that a change must pass.
check: fmt-check lint test

test *args:
    cargo test --workspace {{ args }}

fmt:
    cargo fmt --all

fmt-check:
    cargo fmt --all --check

lint:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Fetch a small model, train it, compare before and after, export.
quickstart *args:
    cargo run --release -- train recipes/quickstart.toml {{ args }}

# Compare with a real llama.cpp and PEFT over a real model; the first run fetches them.
e2e:
    cargo test -p tune --test e2e

# Measure steps, generation and tokenising against other programs; docs/benchmarks.md says what has to be there.
rivals *args:
    target/e2e-venv/bin/python benches/rivals/compare.py {{ args }}

# The whole pipeline, as on a fresh clone.
ci:
    .ci/run
