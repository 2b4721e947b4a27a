#!/usr/bin/env bash
# Measures on a machine with a GPU and a bare CUDA image, without network:
#
#     benchmarks/on_device.sh OUT CARRIED [flags of `python -m benchmarks.on_device`]
#
# CARRIED holds wheels/*.whl (packages that the image lacks), minilm/ (a checkpoint) and glue/ (TSV folders). The results
# are OUT/on_device.json, written anew after each row; OUT/log.txt has what the processes printed. PYTHON names the
# interpreter, python3 otherwise. With --rehearse it runs tiny cases on CPU.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,8p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd) carried=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -z "${NO_WHEELS:-}" ] && compgen -G "$carried/wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$carried"/wheels/*.whl
fi
export PYTHONPATH="$PWD:$site" PYTHONUNBUFFERED=1
"$python" -m benchmarks.on_device --out "$out" --carried "$carried" "$@"
