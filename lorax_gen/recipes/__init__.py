"""The trainable methods: for each a config and the experiment built from it.

lora_gen   a LoRA-Gen generator
lora       one LoRA on all seen tasks, the baseline
loramoe    token-routed experts at the feed-forward kernels, a baseline
mixlora    token-routed feed-forward networks with LoRAs, a baseline
pretrain   a language model of the embedded world
base       what all recipes share
tuning     what lora, loramoe and mixlora share
data       training batches and evaluations of a recipe
registry   recipes by name, and their config files
report     the page of runs and evaluations; gates: what a run's generator gives to its prompts
"""
