"""Frozen models in use: text in, text, log-likelihoods or task cards out.

generation      prompts continued by a model, at once or streamed
continuations   many texts continued in batches of few shapes
choices         log-likelihoods of choices after their contexts
packing         rows of tokens in which texts share their contexts
cards           prompts to gates and task cards
"""
