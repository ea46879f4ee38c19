# How ordered must the data be, and what orders it: passes over the topics in an epoch x a shuffled end, and what a
# window holds (one topic or several) x what a batch holds. The structured chain, three seeds.
from config.structured import *

out_dir = 'out/order'
arms = ('mha_shuffled', 'mha_shuffled_pure', 'mha_topic_ordered_pure',
        'mha_topic_ordered', 'mha_topic_ordered_cd5', 'mha_topic_ordered_cd20',
        'mha_topic_c4', 'mha_topic_c4_cd5', 'mha_topic_c4_cd20',
        'mha_topic_c16', 'mha_topic_c16_cd5', 'mha_topic_c16_cd20',
        'mha_topic_c64', 'mha_topic_c64_cd5', 'mha_topic_c64_cd20')
seeds = (0, 1, 2)
recal_iters = 0.3
eval_interval = 100         # a topic is away for 250 steps and more: see it go and come back
