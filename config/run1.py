# Run 1 of the log: {MHA, GQA} x {shuffled, topic} x {RoPE, DroPE}, 27M parameters, 10K steps. The other values are the
# defaults of the scripts. Recalibration as in the log: 1% of the steps at a tenth of the rates.
data_dir = 'data/run1'
out_dir = 'out/run1'
arms = ('mha_shuffled', 'mha_topic_ordered', 'gqa_shuffled', 'gqa_topic_ordered')
recal_iters = 0.01
recal_lr_scale = 0.1
