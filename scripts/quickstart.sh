#!/usr/bin/env bash
# From nothing to a small Japanese language model, in a few minutes on a laptop: packages, build, corpus, tokenizer,
# token shards, training on 2 MPI ranks with a stop and a resume, loss curve, text sampled from the model.
#
#   scripts/quickstart.sh [--help]
#
# Takes some minutes on two cores and about 1 GB of disk. Installs, as root, the Debian packages that are missing
# (scripts/install.sh --list build quickstart); without root it prints the one line that installs them. Downloads four
# packages of Japanese documentation for their text, and nothing else.
#
# What it makes lies in quickstart/ and runs/quickstart/. Steps whose product is there are skipped, so it may be stopped
# and started again at any point; `rm -r quickstart runs/quickstart` starts afresh.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/.."
[[ $# -eq 0 ]] || { echo "scripts/quickstart.sh takes no words; see scripts/quickstart.sh --help" >&2 && exit 2; }

out=quickstart
run=runs/quickstart
config=configs/quickstart.yaml
steps=$(sed -nE 's/^run:.*[{, ]steps: *([0-9]+).*/\1/p' $config)
checkpoint=$run/step-$(printf %08d "$steps")
packages=(manpages-ja manpages-ja-dev debian-reference-ja libreoffice-help-ja)

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

# is_made PRODUCT INPUT...: the product is there and none of its inputs is newer.
is_made() {
    local product=$1 input
    [[ -e $product ]] || return 1
    for input in "${@:2}"; do
        [[ ! $input -nt $product ]] || return 1
    done
    echo "$product is there"
}

# mpirun on this machine alone, over shared memory; also as root, as one is in a container.
on_ranks() {
    local options=(-n "$1" --bind-to none --mca btl "self,vader" --mca btl_vader_single_copy_mechanism none)
    export OMPI_MCA_oob_tcp_if_include=lo # for Open MPI 4; as an option it would stop 5
    [[ $(nproc) -ge $1 ]] || options+=(--oversubscribe)
    if [[ $(id -u) -eq 0 ]]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    mpirun "${options[@]}" "${@:2}"
}

download() { (cd "$2/download" && apt-get download --quiet=2 -o APT::Sandbox::User=root "$1"); }

# The text packages are downloaded and unpacked here rather than installed: that needs no root, and container images of
# Debian leave out documentation when they install packages.
fetch_package() {
    local package=$1 folder=$out/packages
    if is_made "$folder/$package"; then
        return
    fi
    mkdir -p "$folder/download"
    rm -f "$folder/download/$package"_*.deb
    # apt's lists may be old and name a version that the mirror no longer has; only root may renew them.
    download "$package" "$folder" || { [[ $(id -u) -eq 0 ]] && apt-get update --quiet=2 && download "$package" "$folder"; } || {
        echo "Could not download $package. Renew apt's lists (sudo apt-get update) and run this script again." >&2
        exit 1
    }
    rm -rf "$folder/$package.part"
    dpkg -x "$folder/download/$package"_*.deb "$folder/$package.part"
    mv "$folder/$package.part" "$folder/$package"
}

make_corpus() {
    is_made $out/corpus.jsonl scripts/quickstart/corpus.py && return
    /usr/bin/python3 scripts/quickstart/corpus.py $out/packages $out/corpus.part
    mv $out/corpus.part $out/corpus.jsonl
}

# A unigram model with byte fallback, as national Japanese models use, on every tenth document. The text is kept as it
# is: no normalisation, spaces and line ends included, so that decoding gives back the very text that was encoded.
make_tokenizer() {
    is_made $out/tok.model $out/corpus.jsonl && return
    jq -r 'select(input_line_number % 10 == 1).text' $out/corpus.jsonl >$out/tok-sample.txt
    spm_train --input=$out/tok-sample.txt --model_prefix=$out/tok.part --model_type=unigram --vocab_size=8192 \
        --byte_fallback --character_coverage=0.9995 --split_digits --allow_whitespace_only_pieces \
        --normalization_rule_name=identity --remove_extra_whitespaces=false --add_dummy_prefix=false \
        --max_sentence_length=65536 --num_threads=2 --minloglevel=1 >$out/tok.log 2>&1 || {
        cat $out/tok.log
        exit 1
    }
    mv $out/tok.part.vocab $out/tok.vocab
    mv $out/tok.part.model $out/tok.model
    echo "8192 pieces, for example: $(awk -F'\t' 'NR > 300 && NR % 500 == 0 { printf "%s ", $1 }' $out/tok.vocab)"
}

make_shards() {
    is_made $out/shards/ja $out/tok.model && return
    rm -rf $out/shards
    build/tatara prepare --tokenizer $out/tok.model --out $out/shards/ja \
        --valid-out $out/shards/ja-valid --valid-fraction 0.02 $out/corpus.jsonl
}

# Half of the steps in one process, which is told to end there, the rest in another, which resumes from the checkpoint.
train() {
    is_made "$checkpoint" && return
    if [[ ! -e $run/metrics.jsonl ]]; then
        on_ranks 2 build/tatara train $config run.stop_at=$((steps / 2))
        printf '\nStopped half-way on purpose. A new process resumes from the checkpoint:\n\n'
    fi
    on_ranks 2 build/tatara train $config
}

# Of the held-out tokens, in nats: the loss of a model that knows how frequent each token is and nothing more.
unigram_entropy() { build/tatara data show --entropy $out/shards/ja-valid | awk '/^unigram entropy/ { print $3 }'; }

draw_curve() {
    is_made $out/loss.png $run/metrics.jsonl && return
    local entropy
    entropy=$(unigram_entropy)
    jq -r 'select(.event | not) | [.step, .loss] | @tsv' $run/metrics.jsonl >$out/loss-train.tsv
    jq -r 'select(.event == "evaluation") | [.step, .loss] | @tsv' $run/metrics.jsonl >$out/loss-valid.tsv
    gnuplot -e "train='$out/loss-train.tsv'; valid='$out/loss-valid.tsv'; entropy=$entropy; out='$out/loss.part'" \
        scripts/quickstart/loss.gp
    mv $out/loss.part $out/loss.png
    echo "$out/loss.png"
}

sample() {
    is_made $out/sample.txt "$checkpoint" && return
    # Cooler, so small a model falls into repeating the headings that every page has.
    build/tatara sample --ckpt "$checkpoint" --tokens 60 --temperature 0.9 --top-k 0 --seed 3 \
        --prompt 'このオプションを指定すると、' --prompt '以下のような場合に' --prompt 'ファイルの名前は' | tee $out/sample.part
    mv $out/sample.part $out/sample.txt
}

started=$SECONDS

step "1/9 Debian packages"
scripts/install.sh build quickstart
mkdir -p $out

step "2/9 Build"
if [[ ! -e build/build.ninja ]]; then
    mkdir -p build
    cmake -S . -B build -G Ninja -DTATARA_TESTS=OFF >build/configure.log 2>&1 || {
        cat build/configure.log
        exit 1
    }
fi
cmake --build build --target tatara

step "3/9 Japanese text from Debian packages"
for package in "${packages[@]}"; do
    fetch_package "$package"
done

step "4/9 Corpus: one document a page"
make_corpus

step "5/9 Tokenizer"
make_tokenizer

step "6/9 Token shards"
make_shards

step "7/9 Training on 2 ranks, with a stop and a resume"
train

step "8/9 Loss curve"
draw_curve

step "9/9 Text from the model"
sample

root=''
[[ $(id -u) -ne 0 ]] || root=' --allow-run-as-root'
minutes=$(((SECONDS - started) / 60)) seconds=$(((SECONDS - started) % 60))
loss=$(jq -r 'select(.event == "evaluation").loss' $run/metrics.jsonl | tail -n 1)
step "Done in $minutes min $seconds s"
cat <<EOF
Loss on held-out documents: $(printf %.3f "$loss") nats per token. Knowing only how frequent each token is would give
$(unigram_entropy); a trained model's lead over that is what it learnt of the language.

  $out/corpus.jsonl     the text, a document a line
  $out/tok.model        the tokenizer
  $out/shards/          the tokens, for training and held out
  $run/      checkpoints, config.yaml, metrics.jsonl
  $out/loss.png         the loss curve
  $out/sample.txt       what the model writes

To try next:
  build/tatara sample --ckpt $checkpoint --prompt 'インターネット' --temperature 0.9
  build/tatara train --help-config                              every option of a run
  mpirun -n 2 --bind-to none$root build/tatara train $config run.dir=runs/longer run.steps=2000
  README.md, "A first run of your own"                          with your own text
EOF
