# Run 1, 8 query heads on 4 key-value heads, rows topic by topic
n_kv_head = 4
order = 'topic'
