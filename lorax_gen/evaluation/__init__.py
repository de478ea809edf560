"""How good a system is, and what it costs.

system          what is evaluated: an edge model, a cloud, a generator
suite, tables   several benchmarks in several modes, as one report, and how it is shown
benchmark       one benchmark in one mode, with a file of single items (item_log)
choices         log-likelihoods of choices, from rows that share contexts (packing)
metrics         accuracies, standard errors, means
gates           what the cloud makes of many prompts
agent           GPT4Tools: answers written (continuations) and scored (agent_metrics)
questions       questions with one right answer; report: the world's, methods side by side
harness         lm-evaluation-harness on our models (harness_model)
cost, latency   multiply-accumulates counted, seconds and bytes measured
pictures        of reports and runs
"""
