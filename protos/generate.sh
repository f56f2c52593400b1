#!/usr/bin/env bash
# Regenerate the stubs: `make protos`. grpcio-tools 1.76 on purpose: its output loads on protobuf 6 and 7.
# usage: protos/generate.sh PYTHON_WITH_GRPCIO_TOOLS [OUTPUT_ROOT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${2:-.}
"$1" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/*.proto
