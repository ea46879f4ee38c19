# Run 1 of the log: {MHA, GQA} x {shuffled, topic} x {RoPE, DroPE}, 27M parameters, 10K steps. The other values are the
# defaults of the scripts. Recalibration as in the log, 1% of the steps at a tenth of the rates; and 10% at full rates.
data_dir = 'data/run1'
out_dir = 'out/run1'
arms = ('mha_shuffled', 'mha_topic_ordered', 'gqa_shuffled', 'gqa_topic_ordered')
seeds = (0, 1)
recal_iters = (0.01, 0.1)
recal_lr_scale = (0.1, 1.0)
