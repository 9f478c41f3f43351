#!/bin/sh
# Makes the virtual environment that the Makefile uses: requirements/install.sh [VENV]
#
# Nothing is done twice: VENV/kdsr-installed holds a checksum of what was asked for. A changed requirement is installed
# into the environment that is there; one whose installation was interrupted, or that has moved, is made anew.
#   PYTHON=...       the interpreter (3.11 or 3.12) instead of the first one found
#   TORCH_INDEX=...  a package index with CPU builds of torch; without one, pip's own, whose Linux builds are for CUDA
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch_index=${TORCH_INDEX-}
installed=$venv/kdsr-installed
unfinished=$venv/kdsr-unfinished
wanted=$(pwd; cat requirements/*.txt requirements/install.sh setup.py | cksum)

supported() { # a Python of the right version that can make an environment
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

if [ -f "$installed" ] && [ "$(cat "$installed")" = "$wanted" ] && supported "$venv/bin/python"; then
    exit 0
fi

# what --clear empties, and `make clean` removes, must be an environment
if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && { [ ! -d "$venv" ] || [ -n "$(ls -A "$venv")" ]; }; then
    echo "kdsr: $venv exists and is no virtual environment; name another place with 'make VENV=DIR'" >&2
    exit 2
fi

if [ -n "${PYTHON-}" ]; then
    candidates=$PYTHON
else
    candidates="python3.11 python3.12 python3 python"
fi
python=
for candidate in $candidates; do
    if supported "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "kdsr needs Python 3.11 or 3.12 with venv (tried: $candidates); name one with 'make PYTHON=/path/to/python3.11'" >&2
    exit 2
fi

moved=no # an environment holds absolute paths
if [ -f "$installed" ] && [ "$(head -n 1 "$installed")" != "$(pwd)" ]; then moved=yes; fi
if [ -e "$unfinished" ] || [ $moved = yes ] || ! supported "$venv/bin/python"; then
    echo "kdsr: creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
touch "$unfinished"
rm -f "$installed"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

say() { echo "kdsr: $*"; }
say "installing into $venv; the first time this takes some minutes"
say "torch and torchvision"
pip install -qq --no-deps ${torch_index:+--extra-index-url "$torch_index"} -r requirements/torch.txt
say "libraries and tools"
pip install -qq -c requirements/constraints.txt \
    -r requirements/build.txt -r requirements/base.txt -r requirements/export.txt -r requirements/dev.txt
say "basicsr and kdsr"
pip install -qq --no-deps --no-build-isolation -r requirements/basicsr.txt
pip install -qq --no-deps --no-build-isolation --editable .
printf '%s' "$wanted" >"$installed"
rm -f "$unfinished"
