#!/usr/bin/env bash
# Starts this node's processes of a run over several nodes; run it on every node with the same arguments.
#   examples/launch/nodes.sh FIRST_NODE NODES CONFIG.yaml [--section.key VALUE ...]
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: $0 FIRST_NODE NODES CONFIG.yaml [--section.key VALUE ...]" >&2
    exit 2
fi
first="$1" nodes="$2"
shift 2

export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# one process for each GPU of this node; SID_PROCESSES=cpu takes its cores
exec torchrun --nnodes "$nodes" --nproc-per-node "${SID_PROCESSES:-gpu}" \
    --rdzv-backend c10d --rdzv-id "${SID_RUN:-sid}" --rdzv-endpoint "$first:${SID_PORT:-29500}" --max-restarts 3 \
    -m sidlm.cli.main train "$@"
