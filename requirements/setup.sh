#!/usr/bin/env bash
# setup.sh VENV: a virtual environment with the CPU stack and this package, for trying and
# developing without a GPU.
set -euo pipefail
venv=${1:?folder of the virtual environment}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)

"$python" - <<'P'
import platform, sys
if sys.version_info[:2] != (3, 11) or platform.system() != "Linux" or platform.machine() != "x86_64":
    sys.exit(
        f"The CPU stack needs Python 3.11 on x86-64 Linux (vLLM's CPU build), found {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}. Another interpreter: make PYTHON=python3.11 ..."
    )
P

start=$SECONDS
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
echo "[setup] pip, setuptools, wheel"
$pip install -q "pip>=24" setuptools==77.0.3 wheel
echo "[setup] PyTorch's CPU build"
if ! $pip install -q --no-deps "torch==2.13.0+cpu"; then
    cat >&2 <<'M'

[setup] pip found no CPU build of PyTorch. It is on PyTorch's own wheel index, which pytorch.org's installation page names
        for "Stable, Linux, Pip, Python, CPU". Tell pip of it and run the same command again:
            export PIP_EXTRA_INDEX_URL=<that index>
M
    exit 1
fi
echo "[setup] $(grep -c == "$here/cpu.txt") pinned packages (about 3 GB; a few minutes)"
# --no-deps: the list is complete, and the resolver would add CUDA builds of torchvision, torchaudio
# and torchcodec
$pip install -q --no-deps --no-build-isolation -r "$here/cpu.txt"
$pip install -q --no-deps --no-build-isolation "$here/vllm-alias"
PYTHONWARNINGS=ignore $pip install -q --no-deps --no-build-isolation -e "$here/.."
echo "[setup] done in $((SECONDS - start)) s: $(du -sh "$venv" | cut -f1) in $venv"
