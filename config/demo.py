# The whole matrix in miniature, for two CPU cores: a group chain small enough to be learned in under a minute
data_dir = 'data/demo'
out_dir = 'out/demo'
arms = ('mha_shuffled', 'mha_topic_ordered', 'gqa_shuffled', 'gqa_topic_ordered')
chain, beta, n_groups, repeats = 'group', 2.0, 16, False
n_topics, vocab_size, block_size, min_segment_len = 4, 64, 128, 16
train_rows, val_rows = 8_000, 500
n_layer, n_embd, n_head, head_dim, mlp_hidden = 2, 64, 4, 16, 176
batch_size = 32
max_iters = 560
eval_interval = 100
adam_lr = 3e-3
recal_iters = 0.2
null_draws = 50
lens_rows, lens_draws = 40, 3
jobs = 2                    # two arms at a time, a core each
