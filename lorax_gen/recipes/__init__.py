"""The methods that can be trained: a config each, and the experiment it makes.

lora_gen   a LoRA-Gen generator
lora       one LoRA on all seen tasks, the baseline
pretrain   a language model of the embedded world
base       what all recipes share
data       training batches and evaluations of a recipe
registry   recipes by name, and their config files
"""
