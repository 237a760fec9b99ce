#!/usr/bin/env bash
# make_peers.sh DIR: a virtual environment at DIR with the peers that tools/bench/prepare.py measures, as they are released.
set -euo pipefail
dir=${1:?usage: make_peers.sh DIR}
[[ -x $dir/bin/python ]] || python3 -m venv "$dir"
"$dir/bin/pip" install --disable-pip-version-check -q --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0 megatron-core==0.16.1 datasets==5.0.1 litdata==0.2.76 mosaicml-streaming==0.10.0 \
    sentencepiece==0.2.3 tokenizers==0.22.2 mistral-common==1.13.1
# A real SentencePiece model of 32,000 pieces to measure with.
find "$dir" -path '*mistral_common/data/tokenizer.model.v1' -exec cp {} "$dir/mistral.model" \;
