# The whole matrix in miniature, for two CPU cores: a group chain small enough that heads turn topical in two minutes
data_dir = 'data/demo'
out_dir = 'out/demo'
arms = ('mha_shuffled', 'mha_topic_ordered', 'gqa_shuffled', 'gqa_topic_ordered')
chain, beta, n_groups, repeats = 'group', 2.5, 16, False
n_topics, vocab_size, block_size, min_segment_len = 3, 64, 128, 25
train_rows, val_rows = 8_000, 240
n_layer, n_embd, n_head, head_dim, mlp_hidden = 4, 48, 4, 12, 96
batch_size = 16
max_iters = 1_100
eval_interval = 275
muon_lr, adam_lr = 0.04, 0.01
recal_iters = 0.1
probe_tokens, null_draws = 10_000, 50
lens_rows, lens_draws = 16, 3
jobs = 2                    # two arms at a time, a core each
