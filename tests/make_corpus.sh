#!/usr/bin/env bash
# Makes the small corpus that the end-to-end tests share: make_corpus.sh OUTDIR [TATARA]
#
# Writes OUTDIR/corpus.jsonl (Japanese-like sentences from a fixed grammar and a fixed random generator, about 200 kB,
# with ids, sources, licences) and OUTDIR/tok.model (512 pieces, unigram with byte fallback). With TATARA, the program,
# also the shards OUTDIR/train and OUTDIR/valid.
set -euo pipefail
(($# >= 1 && $# <= 2)) || { echo "usage: $0 OUTDIR [TATARA]" >&2; exit 2; }
out=$1
mkdir -p "$out"

# Words come from one Lehmer generator (Park & Miller 1988), so every awk writes the same bytes.
LC_ALL=C awk '
function pick(list, n) { seed = seed * 16807 % 2147483647; return list[1 + int(seed / 65536) % n] }
BEGIN {
    seed = 20240229
    subjects = split("私 先生 猫 犬 東京 鉄 刀 山 川 学生 船 鳥 職人 炉 火 水 雪 春 秋 町", subject, " ")
    particles = split("は が も", particle, " ")
    objects = split("本 米 砂 砂鉄 炭 風 花 道 歌 夢 手紙 写真 海 空 庭 森 石 橋", object, " ")
    verbs = split("読む 見る 作る 運ぶ 集める 燃やす 歌う 歩く 待つ 描く 使う 守る", verb, " ")
    adverbs = split("静かに 毎日 ゆっくり 朝早く 何度も そっと 遠くで よく 少しだけ 一人で", adverb, " ")
    sources = split("新聞 小説 web", source, " ")
    licences = split("CC-BY-4.0 CC0-1.0 Apache-2.0", licence, " ")
    for (d = 0; d < 500; d++) {
        text = ""
        sentences = 4 + int(d * 7 % 13)
        for (s = 0; s < sentences; s++) {
            text = text pick(subject, subjects) pick(particle, particles) pick(adverb, adverbs)
            text = text pick(object, objects) "を" pick(verb, verbs) "。" (s % 5 == 4 ? "\\n" : "")
        }
        printf "{\"id\": \"doc-%04d\", \"source\": \"%s\", \"licence\": \"%s\", \"language\": \"ja\", \"text\": \"%s\"}\n", \
            d, source[1 + d % sources], licence[1 + d % licences], text
    }
}' >"$out/corpus.jsonl"

sed 's/.*"text": "//; s/"}$//; s/\\n/\n/g' "$out/corpus.jsonl" >"$out/corpus.txt"
spm_train --input="$out/corpus.txt" --model_prefix="$out/tok" --vocab_size=512 --hard_vocab_limit=false \
    --model_type=unigram --byte_fallback=true --character_coverage=1 --normalization_rule_name=identity \
    --remove_extra_whitespaces=false --add_dummy_prefix=false --num_threads=1 --minloglevel=2 2>"$out/spm_train.log" ||
    { cat "$out/spm_train.log" >&2; exit 1; }

if (($# == 2)); then
    "$2" prepare --overwrite --tokenizer "$out/tok.model" --out "$out/train" --valid-out "$out/valid" \
        --valid-fraction 0.1 --threads 2 "$out/corpus.jsonl"
fi
