#!/usr/bin/env bash
# Installs c2f_ray and what it needs into .venv. `make` calls this; interrupted, it ends what it started.
#   requirements/install.sh PYTHON [options of uv that say where torch comes from]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

step=
interrupted() {
    if [ -n "$step" ]; then
        kill "$step" 2>/dev/null || true
        wait "$step" 2>/dev/null || true
    fi
    echo "the installation was interrupted; run the same command again" >&2
    exit "$1"
}
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

# In the background, so that a signal is handled at once and not when the step has ended.
run() {
    "$@" &
    step=$!
    wait "$step"
    step=
}

run "$python" -c 'import sys; sys.exit("c2f_ray needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
echo "installing about 5 GB into .venv: some minutes"
# What an interrupted installation left is not trusted: packages may lack files. Downloads are cached.
[ -f .venv/.installed ] || rm -rf .venv
rm -f .venv/.installed
run "$python" -m venv .venv
run .venv/bin/python -m pip install --quiet uv==0.13.8
run .venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode "$@" \
    --override requirements/overrides.txt -r requirements/cpu.txt
run .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
touch .venv/.installed
