# The log's sanity check: 3 topics that are easy to tell apart, a 3.8M model, MHA only
data_dir = 'data/sanity'
out_dir = 'out/sanity'
seeds = (0, 1, 2, 3, 4, 5)
arms = ('mha_shuffled', 'mha_topic_ordered')
n_topics = 3
vocab_size = 512
concentration = 100.0
train_rows, val_rows = 20_000, 2_000
block_size = 256
min_segment_len = 32        # five segments must fit into a row
n_layer, n_embd, n_head, head_dim, mlp_hidden = 4, 256, 4, 64, 864
max_iters = 5_000
recal_iters = (0.01, 0.1)
recal_lr_scale = (0.1, 1.0)
