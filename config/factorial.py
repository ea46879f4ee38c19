# Does order matter after DroPE, and if so at equal loss? The structured chain, four orders, a model that never had
# RoPE, and recalibrations of six lengths, each a schedule of its own: a cosine to zero makes the end of a short one
# another model than a point on the way of a long one. Six seeds.
out_dir = 'out/factorial'
arms = ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_pseudo', 'mha_shuffled_nope')
seeds = (0, 1, 2, 3, 4, 5)
recal_iters = (0.3, 0.0, 0.01, 0.04, 0.1, 5000)
full_at = (0.3, 0.0, 0.1, 5000)
eval_interval = 250
data_dir = 'data/structured'
chain, beta, n_groups, repeats = 'group', 1.5, 32, False
n_topics, vocab_size, block_size, min_segment_len = 5, 512, 256, 32
train_rows, val_rows = 100_000, 1_000
n_layer, n_embd, n_head, head_dim, mlp_hidden = 4, 256, 4, 64, 688
max_iters = 5_000
adam_lr = 3e-3
grad_clip = 0.0
