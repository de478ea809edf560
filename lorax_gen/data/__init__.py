"""Text to fixed-shape integer arrays; knows no jax.

sources         configs: the embedded world, or a mixture of real tasks
world, tasks    the embedded world and its tasks
benchmarks      the eight benchmarks, a record each, of questions
instructions    Alpaca's triples, tasks of Natural Instructions
agent           GPT4Tools
episodes        training samples: a prompt for the cloud, questions for the edge
mixture         batches of several sources; unseen: what never enters them
batches         tokens, padding, the batches of the world
readers, hub_rows   rows of files and of the hub
"""
