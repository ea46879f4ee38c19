# Wikipedia with seeds and controls: 64,000 articles, 34M parameters, two passes over 145,000 rows or so.
# Primary, named before the runs: E, how much less alike the profile of P over heads is to two shuffles than these are
# to one another, for topic order after DroPE for 10% of the steps. It is read only where the profile's split-half
# reliability is above .8, and beside the floor of rounding: how alike (report.alike) mha_shuffled and a rerun of it are,
# --arms=mha_shuffled_rerun --seeds=0 --out_dir=out/wiki_floor
from config.wiki import *

data_dir = 'data/wiki_mid'
out_dir = 'out/wiki_mid'
arms = ('mha_shuffled', 'mha_reshuffled', 'mha_pseudo', 'mha_topic_ordered')
seeds = tuple(range(8))         # as many as there is time for, in this order, every arm of a seed
max_articles = 64_000
n_layer, n_embd, n_head, head_dim, mlp_hidden = 8, 512, 8, 64, 1376
max_iters = 4_560
warmup_iters = 200
recal_iters = (0.1, 0.0, 0.01, 0.3)
