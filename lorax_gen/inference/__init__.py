"""Inference with frozen models: text in; text, log-likelihoods or task cards out.

generation      prompts continued by a model, complete or streamed
stopping        where a generated text ends: stop tokens and stop strings
continuations   many texts continued in batches of few shapes
choices         log-likelihoods of choices after their contexts
packing         rows of tokens in which texts share their prefix
cards           prompts to gates and task cards
"""
