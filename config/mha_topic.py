# Run 1, MHA, rows topic by topic
order = 'topic'
