#!/usr/bin/env bash
# make_peers.sh DIR: virtual environments with the peers, as they are released: DIR for tools/bench/prepare.py and
# loader.py, DIR/train for tools/bench/train.py.
set -euo pipefail
dir=${1:?usage: make_peers.sh DIR}
for env in "$dir" "$dir/train"; do
    [[ -x $env/bin/python ]] || python3 -m venv "$env"
done
install() {
    "$1/bin/pip" install --disable-pip-version-check -q --extra-index-url https://download.pytorch.org/whl/cpu \
        torch==2.13.0 "${@:2}"
}
install "$dir" megatron-core==0.16.1 datasets==5.0.1 litdata==0.2.76 mosaicml-streaming==0.10.0 \
    sentencepiece==0.2.3 tokenizers==0.22.2 mistral-common==1.13.1
install "$dir/train" litgpt==0.5.13 transformers==4.57.6
# A real SentencePiece model of 32,000 pieces to measure with.
find "$dir" -path '*mistral_common/data/tokenizer.model.v1' -exec cp {} "$dir/mistral.model" \;
