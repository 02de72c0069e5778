#!/bin/sh
# Makes the environment: install.sh PYTHON VENV. Exact versions are in constraints.txt.
#
# PyTorch comes as a CPU build where there is no NVIDIA GPU, if one can be had: by pip's own settings (an index or a
# folder of wheels that they name), else through uv, which knows where PyTorch keeps its CPU builds. Where neither has
# one, the plain build is installed; it runs on a CPU too, and is only larger.
set -eu
python=$1 venv=$2
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)

if ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        $pip install "$torch"
    else
        $pip install --quiet --no-deps "$torch+cpu" 2>/dev/null ||
            { $pip install --quiet uv && "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu "$torch"; } ||
            $pip install "$torch"
    fi
fi
$pip install --constraint constraints.txt --editable ".[dev]"
