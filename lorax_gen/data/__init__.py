"""Text to fixed-shape integer arrays; imports no jax.

config          configs of training data: the embedded world, or a mixture of real tasks
world           the embedded world: facts, tasks, text for pretraining
tasks           a task: a system prompt in several wordings, questions and answers
world_batches   batches of the world
benchmarks      the eight benchmarks, one record each
questions       multiple-choice questions, from the rows of published data sets
instructions    Alpaca's triples and the tasks of Natural Instructions
agent           GPT4Tools
sources         training episodes: a prompt for the cloud, questions for the edge
mixture         batches drawn from several sources
unseen          keeps the unseen benchmarks out of training
tokens          encoding, bucketing, padding
readers         rows of files
hub_rows        rows of data sets on the hub
"""
