# The loss curve of a run.   gnuplot -e "train='…tsv'; valid='…tsv'; entropy=6.9; out='loss.png'" loss.gp
# train and valid: step and loss, tab-separated. entropy: of the held-out tokens' frequencies, in nats.
set terminal pngcairo size 1000,600 font "sans,12"
set output out
set title "Tatara quick start: loss on Japanese text"
set xlabel "optimizer step"
set ylabel "loss (nats per token)"
set grid linecolor "gray80"
set key top right
set yrange [*:*]
plot train using 1:2 with lines linewidth 2 linecolor "#1f77b4" title "training", \
     valid using 1:2 with linespoints linewidth 2 pointtype 7 linecolor "#d62728" title "held-out documents", \
     entropy with lines dashtype 2 linewidth 2 linecolor "gray40" \
         title sprintf("unigram entropy of held-out tokens (%.2f)", entropy)
