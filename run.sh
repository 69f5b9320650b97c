#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, gets the data, trains. A second start skips what is done.
#
#   ./run.sh [--name=value ...]    on GPUs the speedrun on FineWeb, without one the smoke run on an offline sample
#   NGPU=2 ./run.sh                on the first two GPUs
#   ./run.sh test [pytest args]    the set-up, then the tests
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as: sh run.sh
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

say() { printf 'run.sh: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

case "${NGPU:-1}" in
1 | 2 | 4 | 8) ;;
*) fail "NGPU=$NGPU: 1, 2, 4 or 8 processes share a step's 8 micro-batches evenly" ;;
esac
shards=${TRAIN_SHARDS:-9}
[[ $shards =~ ^[1-9][0-9]{0,2}$ && $shards -le 103 ]] || fail "TRAIN_SHARDS=$shards: expected a whole number from 1 to 103"

# ---- set-up: a virtual environment with requirements.txt, unless PYTHON names a Python that has them
if [ -z "${PYTHON:-}" ]; then
    for base in python3 python3.13 python3.12 python3.11 ""; do
        "${base:-true}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ -n "$base" ] || fail "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || echo missing)"
    PYTHON=.venv/bin/python
    if ! "$PYTHON" -c 'import pip' 2>/dev/null; then
        say "making the virtual environment .venv"
        for folder in . .venv; do
            [ ! -e $folder ] || [ -w $folder ] || fail "cannot write to $(realpath $folder): no permission, or read-only"
        done
        clear=--clear # what is there is of a Python that is gone
        ! "$PYTHON" -c '' 2>/dev/null || clear=
        rm -f .venv/installed-requirements.txt
        if ! "$base" -m venv $clear .venv; then
            "$base" -c 'import ensurepip' 2>/dev/null || fail "on Debian and Ubuntu: apt install python3-venv"
            fail "could not make .venv, for the reason above"
        fi
    fi
    if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
        say "installing requirements.txt"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "pip could not install requirements.txt, for the reason above"
        cp requirements.txt .venv/installed-requirements.txt
    fi
fi

if [ "${1:-}" = test ]; then
    shift
    exec "$PYTHON" -m pytest --numprocesses=auto --dist=loadfile "$@" # how many: see tests/conftest.py
fi

case " $* " in
*" --help "* | *" -h "*) exec "$PYTHON" train_gpt.py --help ;;
*" --describe "*) exec "$PYTHON" train_gpt.py "$@" ;;
esac

# ---- what to run: the program itself says what it makes of the arguments, before anything is fetched for them
plan=$("$PYTHON" - "$@" <<'END'
import os, sys
from pathlib import Path

sys.path.insert(0, ".")
import torch
import train_gpt

def plan(arguments):
    gpus, asked = torch.cuda.device_count() if torch.cuda.is_available() else 0, os.environ.get("NGPU")
    processes = int(asked or max(n for n in (1, 2, 4, 8) if n <= max(gpus, 1)))
    if gpus and processes > gpus:
        sys.exit(f"run.sh: NGPU={processes}: this host has {gpus} GPUs")
    if gpus > processes and not asked:
        print(f"run.sh: using {processes} of {gpus} GPUs: 1, 2, 4 or 8 share a step evenly", file=sys.stderr)
    if processes > 1:
        os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), RANK="0", LOCAL_RANK="0")
    world = train_gpt.World.from_environment()
    hp, overrides = train_gpt.parse_arguments(arguments, has_gpu=world.on_gpu)
    train_gpt.choose_dtype(hp, world)
    own_data = {"train_files", "val_files"} & overrides.keys()
    tool = train_gpt.import_tool("checkpoint", "--resume") if hp.resume else None
    resumes = hp.resume and (hp.resume != "auto" or tool.checkpoints_of(hp.run_id, Path(hp.log_dir)))
    return processes, "none" if own_data or resumes else Path(hp.train_files).parent.name

try:
    print(*plan(sys.argv[1:]))
except train_gpt.UserError as error:
    sys.exit(f"train_gpt.py: error: {error}")
END
)
read -r processes data <<<"$plan"

# ---- data
case "$data" in
sample) "$PYTHON" data/sample.py ;;
fineweb10B) "$PYTHON" data/cached_fineweb10B.py "$shards" ;;
esac

# ---- train
if [ "$processes" = 1 ]; then
    exec "$PYTHON" train_gpt.py "$@"
fi
# Not --standalone: its ranks meet at the host's own name, and wait eleven minutes where that does not resolve.
exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$processes" --rdzv_backend=c10d \
    --rdzv_endpoint=127.0.0.1:0 --local-addr=127.0.0.1 train_gpt.py "$@"
