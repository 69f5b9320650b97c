#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, gets the data, trains. A second start skips what is done.
#
#   ./run.sh [--name=value ...]    on GPUs the speedrun on FineWeb, without one the smoke run on an offline sample
#   NGPU=2 ./run.sh                on the first two GPUs
#   ./run.sh test [pytest args]    the set-up, then the tests
set -euo pipefail
cd "$(dirname "$0")"

say() { printf 'run.sh: %s\n' "$*" >&2; }

# ---- set-up: a virtual environment with requirements.txt, unless PYTHON names a Python that has them
if [ -z "${PYTHON:-}" ]; then
    for base in python3 python3.13 python3.12 python3.11 ""; do
        "${base:-true}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    if [ -z "$base" ]; then
        say "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || echo missing)"
        exit 1
    fi
    if [ ! -x .venv/bin/pip ]; then
        say "making the virtual environment .venv"
        "$base" -m venv .venv || { say "could not make it; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
    fi
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
        say "installing requirements.txt"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed-requirements.txt
    fi
fi

if [ "${1:-}" = test ]; then
    shift
    exec "$PYTHON" -m pytest "$@"
fi

case " $* " in *" --help "* | *" -h "*) exec "$PYTHON" train_gpt.py --help ;; esac

# ---- what to run: the arguments' preset and data files, or what fits this machine
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
preset=speedrun
[ "$gpus" -gt 0 ] || preset=smoke
own_data=no
for argument in "$@"; do
    case "$argument" in
    --preset=auto) ;;
    --preset=*) preset=${argument#--preset=} ;;
    --train_files=* | --val_files=*) own_data=yes ;;
    esac
done

processes=${NGPU:-$gpus}
if [ -z "${NGPU:-}" ]; then # all GPUs, as far as they divide a step's 8 micro-batches
    for processes in 8 4 2 1; do
        [ "$processes" -gt "$gpus" ] || break
    done
    [ "$gpus" -le "$processes" ] || say "using $processes of $gpus GPUs: 1, 2, 4 or 8 share a step's 8 micro-batches evenly"
fi

# ---- data
if [ "$own_data" = no ]; then
    if [ "$preset" = smoke ]; then
        "$PYTHON" data/sample.py
    else
        "$PYTHON" data/cached_fineweb10B.py "${TRAIN_SHARDS:-9}"
    fi
fi

# ---- train
if [ "$processes" = 1 ]; then
    exec "$PYTHON" train_gpt.py "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py "$@"
